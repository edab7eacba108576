"""Optional libraries: one line with the command that installs them, before any slow work."""

from collections.abc import Sequence
from importlib.util import find_spec

from suture.errors import ConfigError

#: Extra → the modules that it brings.
EXTRAS = {"run": ("transformers", "lightning_fabric", "PIL", "vl_convert")}


def check_installed(user: str, extra: str = "run", modules: Sequence[str] = ()) -> None:
    """Raise `ConfigError` if a module of an extra that `user` needs is missing; by default all of them."""
    missing = [module for module in modules or EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise ConfigError(f"{user} needs {', '.join(missing)}. Remedy: pip install 'suture[{extra}]'.")
