"""The chat template of a merged model: a given one, or the one that most of the models have."""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from suture.checkpoints import Checkpoint
from suture.errors import ConfigError, shown

_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def choose_template(choice: Any, models: Sequence[Checkpoint]) -> str | None:
    """The text of a template: `chatml`, a template itself, or with `auto` the one that most models have, if any.

    Raises `ConfigError` for what is no template.
    """
    if choice is None or choice == "":
        return None
    if choice == "auto":
        templates = Counter(template for model in models for template in _templates(model.directory))
        return templates.most_common(1)[0][0] if templates else None
    if choice == "chatml":
        return _CHATML
    if not isinstance(choice, str) or "{" not in choice:
        problem = f"chat_template: {shown(repr(choice))} is no template"
        raise ConfigError(f"{problem}. Remedy: give auto, chatml, or a template's text.")
    return choice


def template_notes(opened: Collection[Checkpoint]) -> list[str]:
    """A line for each model whose chat template is not the one that goes with the result."""
    texts = [(model, next(_templates(model.directory), None)) for model in opened]
    first, kept = next(((model, text) for model, text in texts if model.directory is not None), (None, None))
    if first is None:
        return []
    others = [model for model, text in texts if text is not None and text != kept]
    has_none = f"'{first.label}', whose files are kept, has none"
    where = has_none if kept is None else f"that of '{first.label}' is kept"
    return [f"'{model.label}' has a chat template of its own; {where}." for model in others]


def write_template(folder: Path, template: str) -> None:
    """Give a model directory this template and no other."""
    (folder / _FILE).write_text(template, "utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    config = _read(folder / _CONFIG)
    if config.pop("chat_template", None) is not None:
        (folder / _CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _templates(directory: Path | None) -> Iterator[str]:
    """The template that a model directory has, if it has one."""
    if directory is None:
        return
    if (directory / _FILE).exists():
        yield (directory / _FILE).read_text("utf-8", errors="replace").strip()
        return
    template = _read(directory / _CONFIG).get("chat_template")
    if isinstance(template, list):  # several by name
        template = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    if isinstance(template, str):
        yield template.strip()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
