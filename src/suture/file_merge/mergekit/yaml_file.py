"""Reading a YAML file of bounded size: what its text could grow into is counted before anything is made of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from suture.errors import ConfigError, shown

_MOST_BYTES = 1 << 18
_MOST_VALUES = 20_000  # counted as often as aliases repeat them
_DEEPEST = 40
_MOST_DOCUMENTS = 100


def load_yaml(path: Path) -> list[dict[str, Any]]:
    """The mappings that the documents of a YAML file hold; raises `ConfigError` in one line."""
    from yaml import SafeLoader, YAMLError

    documents = []
    try:
        text = _text(path)
        _check_events(path, text)
        loader = SafeLoader(text)
        try:
            while loader.check_node():
                node = loader.get_node()
                _check_values(path, node)
                documents.append(loader.construct_document(node))
        finally:
            loader.dispose()
    except YAMLError as error:
        raise ConfigError(f"'{path}' is not valid YAML: {shown(' '.join(str(error).split()))}.") from None
    except (ValueError, TypeError) as error:  # a date or a key that Python does not take
        raise ConfigError(f"'{path}' is not valid YAML: {shown(error)}.") from None
    documents = [document for document in documents if document is not None]
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise ConfigError(f"'{path}' holds no configuration. Remedy: give a YAML file with a merge_method.")
    return documents


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise ConfigError(f"'{shown(path)}' is no file. Remedy: name a YAML file.")
        if path.stat().st_size > _MOST_BYTES:
            raise _too_large(path, f"{path.stat().st_size:,} bytes", f"{_MOST_BYTES:,}")
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"'{shown(path)}' cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"'{path}' is not valid YAML: it is not UTF-8 text.") from None


def _check_events(path: Path, text: str) -> None:
    """Refuse too many documents and deep nesting from the parser's events, which are made without recursion."""
    from yaml import CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, SafeLoader, parse

    documents = depth = 0
    for event in parse(text, SafeLoader):
        documents += isinstance(event, DocumentStartEvent)
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if documents > _MOST_DOCUMENTS:
            raise _too_large(path, "more documents", str(_MOST_DOCUMENTS))
        if depth > _DEEPEST:
            raise _too_large(path, "deeper nesting", f"{_DEEPEST} levels")


def _check_values(path: Path, node: Any) -> None:
    """Refuse aliases that lead back to themselves, or that repeat more values than any configuration has."""
    counts: dict[int, int | None] = {}

    def count(node: Any, depth: int = 1) -> int:
        if depth > _DEEPEST:
            raise _too_large(path, "deeper nesting", f"{_DEEPEST} levels")
        if id(node) not in counts:
            counts[id(node)] = None
            counts[id(node)] = 1 + sum(count(child, depth + 1) for child in _children(node))
        values = counts[id(node)]
        if values is None:
            raise ConfigError(f"'{path}' has an alias that leads back to itself. Remedy: write out the values.")
        return values

    values = 0 if node is None else count(node)
    if values > _MOST_VALUES:
        found = f"{values:,} values" if values < 10**9 else "billions of values"
        raise _too_large(path, found, f"{_MOST_VALUES:,}")


def _children(node: Any) -> Iterator[Any]:
    from yaml import MappingNode, SequenceNode

    if isinstance(node, MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, SequenceNode):
        yield from node.value


def _too_large(path: Path, found: str, most: str) -> ConfigError:
    return ConfigError(f"'{path}' has {found}; at most {most} are read. Remedy: give a mergekit configuration.")
