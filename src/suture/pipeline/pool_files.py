"""Pools in YAML files of the user's own, refused in one line where they are none."""

from pathlib import Path
from typing import Any

from suture.errors import ConfigError

_LARGEST = 1_000_000  # bytes
_MOST_NODES = 100_000


def read_pool(group: str, path: Path) -> dict[Any, Any]:
    """The pool in a file; raises `ConfigError` for anything else than a mapping in YAML of a sensible size."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        _check_expansion(group, path)
        pool = OmegaConf.load(path) if path.stat().st_size else None
    except RecursionError:
        raise ConfigError(f"{group}={path} is nested too deeply. Remedy: write it out without anchors.") from None
    except YAMLError as error:
        raise ConfigError(f"{group}={path} is not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{group}={path} is not text in UTF-8. Remedy: give a pool's YAML file.") from None
    except FileNotFoundError:
        raise ConfigError(f"{group}={path}: there is no such file. Remedy: give the path of a YAML file.") from None
    except OSError as error:
        problem = error.strerror or "it holds no pool"
        raise ConfigError(f"{group}={path}: {problem}. Remedy: give the path of a YAML file.") from None
    content = OmegaConf.to_container(pool) if pool is not None else None
    if not isinstance(content, dict):
        raise ConfigError(f"{group}={path} holds no pool. Remedy: give a YAML file with keys such as models or tasks.")
    if "defaults" in content:
        raise ConfigError(f"{group}={path} has a list of defaults. Remedy: write out what it refers to.")
    return content


def _check_expansion(group: str, path: Path) -> None:
    """Refuse a YAML file too large for a pool, every alias written out: 500 bytes can stand for billions of values."""
    import yaml

    size_on_disk = path.stat().st_size  # raises for a file that is not there
    if not path.is_file() or size_on_disk > _LARGEST:
        raise OSError(None, f"it is no file of at most {_LARGEST} bytes")
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            sizes[id(node)] = 1 + sum(
                size(each) for part in parts for each in (part if type(part) is tuple else (part,))
            )
        return sizes[id(node)]

    root = yaml.compose(path.read_text("utf-8"), yaml.SafeLoader)
    if root is not None and size(root) > _MOST_NODES:
        remedy = "write out what its anchors stand for"
        raise ConfigError(f"{group}={path} stands for more than {_MOST_NODES} values. Remedy: {remedy}.")
