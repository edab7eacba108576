"""The task pool for a start: what models and data say of themselves, and what is left to fill in."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from suture.families import family
from suture.tasks import known
from suture.tasks.class_names import plain

FILL_IN = "# fill in"
_SPLITS = ("train", "test", "val")
_LABELS = ("label", "labels", "class", "target", "idx", "id")  # columns that are no text
_CLASSES = f"    classnames: {FILL_IN}, in the order of the labels: [cat, dog]"
_COLUMNS = f"    text_columns: {FILL_IN}: one column of the data, or two"
_HEAD = "# One task for each model of models.yaml, under the same name: its data, and {}."
_SCORE = "    score: bits_per_byte   # or {metric: acc, choices_column: …}, {metric: exact_match}: docs/language.md"
_QUESTIONS = ["question", "answer"]
_ASKED = """    text_columns: ["question"]
    label_column: answer
    score: exact_match   # of a greedily generated answer; more kinds of score: docs/language.md"""
_PROMPTS = '    # templates: ["a photo of a {}."]   # prompts, instead of the usual ones'
_QUESTION = f'    templates: {FILL_IN}, for example ["question: {{text}} answer:"]'


def task_pool(chosen: str, experts: Mapping[str, Path], data: Mapping[str, Path]) -> str:
    """A task for each expert, with its data if there are any of this name; empty without any data."""
    if not data:
        return ""
    by_name = {plain(name): path for name, path in data.items()}
    lines = [_HEAD.format("how it is scored" if chosen == "causal_lm" else "the names of its classes"), "", "tasks:"]
    for name, expert in experts.items():
        path = by_name.get(plain(name))
        lines.append(f"  {key(name)}:")
        lines.append(f"    source: {quoted(path)}" if path else f"    source: {FILL_IN}: a folder, a file or a hub id")
        lines += _about(chosen, name, expert, path)
    return "\n".join(lines) + "\n"


def _about(chosen: str, name: str, expert: Path, path: Path | None) -> Iterator[str]:
    """The keys of a task after its source."""
    if known(name):
        yield "    # class names and templates are those of the published benchmark of this name"
        return
    columns = _text_columns(path) if path and family(chosen).reads == "texts" else []
    if chosen == "causal_lm" and columns == _QUESTIONS:
        yield _ASKED
        return
    if family(chosen).reads == "texts":
        yield f"    text_columns: {json.dumps(columns, ensure_ascii=False)}" if columns else _COLUMNS
    if chosen == "causal_lm":
        yield _SCORE
        return
    names = (_class_folders(path) if path else []) or _labels(expert)
    yield f"    classnames: {json.dumps(names, ensure_ascii=False)}" if names else _CLASSES
    if chosen in ("clip", "open_clip"):
        yield _PROMPTS
    if chosen == "seq2seq":
        yield _QUESTION


def _text_columns(path: Path) -> list[str]:
    """The columns of a table's first row that are texts, if they are one or two."""
    row: Mapping[str, object] = {}
    for file in sorted(each for split in _SPLITS for each in path.glob(f"{split}*")):
        if file.suffix in (".csv", ".tsv"):
            with open(file, encoding="utf-8", newline="") as opened:
                row = next(csv.DictReader(opened, delimiter="\t" if file.suffix == ".tsv" else ","), {})
        elif file.suffix == ".jsonl":
            with open(file, encoding="utf-8") as opened:
                first = json.loads(opened.readline() or "{}")
            row = first if isinstance(first, dict) else {}
    texts = [name for name, value in row.items() if isinstance(value, str) and plain(name) not in _LABELS]
    return texts if len(texts) <= 2 else []


def _class_folders(path: Path) -> list[str]:
    """The names of the classes, where each is a folder of a split."""
    for split in _SPLITS:
        if names := sorted(each.name for each in (path / split).glob("*") if each.is_dir()):
            return names
    return []


def _labels(expert: Path) -> list[str]:
    """The names of an expert's classes by its configuration; transformers leaves them out where they are two."""
    file = expert / "config.json"
    content = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if not any("Classification" in name for name in content.get("architectures") or ()):
        return []
    names = content.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return [str(name) for _, name in sorted(names.items(), key=lambda pair: int(pair[0]))]


def key(name: str) -> str:
    """A name as a key of YAML."""
    return name if name.replace("-", "").replace("_", "").isalnum() and not name[0].isdigit() else json.dumps(name)


def quoted(path: Path) -> str:
    """A path as a string of YAML."""
    return json.dumps(str(path), ensure_ascii=False)
