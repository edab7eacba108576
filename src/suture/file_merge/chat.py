"""The chat template that a merged model gets: one that is told, or the one that most of the models have."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from suture.checkpoints import Checkpoint
from suture.errors import ConfigError

_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat_template(told: str | None, models: Sequence[Checkpoint]) -> str | None:
    """The text of a template: `chatml`, a template itself, or with `auto` the one that most models have, if any.

    Raises `ConfigError` for what is no template.
    """
    if not told:
        return None
    if told == "auto":
        found = Counter(template for model in models for template in _template(model.directory))
        return found.most_common(1)[0][0] if found else None
    if told == "chatml":
        return _CHATML
    if "{" not in told:
        raise ConfigError(f"chat_template: {told!r} is no template. Remedy: give auto, chatml, or a template's text.")
    return told


def write_template(folder: Path, template: str) -> None:
    """Give a model directory this template and no other."""
    (folder / _FILE).write_text(template, "utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    config = folder / _CONFIG
    if config.exists():
        found = json.loads(config.read_text("utf-8"))
        found.pop("chat_template", None)
        config.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _template(directory: Path | None) -> Iterator[str]:
    if directory is None:
        return
    if (directory / _FILE).exists():
        yield (directory / _FILE).read_text("utf-8").strip()
        return
    told = _read(directory / _CONFIG).get("chat_template")
    if isinstance(told, list):  # several by name
        told = {one.get("name"): one.get("template") for one in told}
    told = told.get("default") if isinstance(told, dict) else told
    if isinstance(told, str):
        yield told.strip()


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
