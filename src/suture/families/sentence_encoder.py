"""Sentence encoders as sentence-transformers saves them, read without that package: https://arxiv.org/abs/1908.10084.

The transformer is merged and pooled as the directory says. Dense layers after the pooling belong to a task's head, and
so does the scaling of embeddings to length one.
"""

import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from suture.checkpoints import open_checkpoint
from suture.core.head import Head
from suture.core.progress import Track, untracked
from suture.errors import CheckpointError, SutureError, one_line, problem
from suture.families.shared.heads import stored_head
from suture.families.shared.pooled import PooledEncoder, PooledTexts
from suture.families.shared.texts import TextReader
from suture.tasks.base import Task, Texts

_MODULES, _TRANSFORMER = "modules.json", "sentence_bert_config.json"
_OWN = (_MODULES, _TRANSFORMER, "config_sentence_transformers.json")
_MODES = {  # keys of a pooling's configuration, in the order in which their features are joined
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = {"GELU": nn.GELU, "Identity": nn.Identity, "ReLU": nn.ReLU, "Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh}
_SCALE = 20.0  # of cosines in the library's ranking losses


class SentenceEncoder(PooledTexts):
    """A directory with modules.json, or a plain text encoder whose `pooling` the pool names.

    Settings are those of `PooledTexts`. Without `heads`, a task's head is zero-shot: 20 times the cosines to the
    embeddings of its class names, which its expert makes, or the pretrained model for a task without one.
    """

    name = "sentence_encoder"

    @classmethod
    def recognises(cls, directory: Path) -> bool:
        """Whether a directory has the modules of a sentence encoder."""
        try:
            modules = json.loads((directory / _MODULES).read_text("utf-8"))
        except (OSError, ValueError):
            return False
        first = modules[0] if isinstance(modules, list) and modules else None
        return isinstance(first, Mapping) and str(first.get("type")).startswith("sentence_transformers.")

    @cached_property
    def reader(self) -> TextReader:
        """The model's tokenizer, which cuts texts where the directory says if the pool does not."""
        own = _read_json(self.directory / _TRANSFORMER) if (self.directory / _TRANSFORMER).is_file() else {}
        length = {"max_length": own["max_seq_length"]} if own.get("max_seq_length") else {}
        positions = getattr(self.config, "max_position_embeddings", None)
        return TextReader(self.directory, {**length, **self.settings}, positions)

    @property
    def poolings(self) -> tuple[str, ...]:
        folders = [folder for kind, folder in _modules(self.directory) if kind == "Pooling"]
        if "pooling" in self.settings or not folders:
            return super().poolings
        return _poolings(folders[0])

    def head(self, task: Task, track: Track = untracked) -> Head:
        """The linear layer in the task's file, or its class names; after the expert's own Dense layers."""
        directory = self._directory_of(task.expert)
        before, normalised = _after_pooling(directory)
        if self._with_files():
            head = stored_head(self.settings["heads"], task.name, len(task.classnames))
            return Head(head.weights, head.bias, normalised=normalised, before=before)
        return Head(self._embedded(task, before), scale=_SCALE, normalised=True, before=before)

    def problems(self, task: Task) -> list[str]:
        try:
            layout = self._layout_problems(task.expert)
        except SutureError as error:
            return [str(error)]
        return layout or super().problems(task)

    def complete(self, out: Path) -> None:
        """Add everything that sentence-transformers reads, from the pretrained model, and the tasks' linear layers."""
        super().complete(out)
        for name in _OWN:
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, out / name)
        for _, folder in _modules(self.directory):
            if folder != self.directory and folder.is_dir():
                shutil.copytree(folder, out / folder.name, dirs_exist_ok=True)

    @torch.no_grad()
    def _embedded(self, task: Task, before: nn.Module | None) -> Tensor:
        """Embeddings of the class names (C, D), of length one."""
        state = self.experts.get(task.expert)
        encoder: PooledEncoder = self.encoder(state)
        texts = Texts({"text": task.classnames}, torch.zeros(len(task.classnames)))
        rows = encoder(**self.reader.tokens(texts, untracked, "Encoding class names"))
        return normalize(rows if before is None else before(rows), dim=-1)

    def _directory_of(self, name: str) -> Path:
        """The expert's directory if it has modules of its own, else the pretrained model's."""
        own = self.experts[name].directory if name in self.experts else None
        return own if own is not None and (own / _MODULES).is_file() else self.directory

    def _layout_problems(self, name: str) -> list[str]:
        own, base = self._directory_of(name), self.directory
        for directory in dict.fromkeys((base, own)):
            for kind, folder in _modules(directory)[1:]:
                if kind not in ("Pooling", "Dense", "Normalize", "Dropout"):
                    return [f"'{directory}' has a module {kind!r}, which family={self.name} does not know."]
                _ = _dense(folder) if kind == "Dense" else None
        config = _read_json(base / _TRANSFORMER) if (base / _TRANSFORMER).is_file() else {}
        if config.get("do_lower_case"):
            remedy = "set it to false and lower the texts"
            return [problem(base / _TRANSFORMER, "has do_lower_case, which is not done here", remedy)]
        prompts = base / _OWN[2]
        if prompts.is_file() and _read_json(prompts).get("default_prompt_name"):
            return [problem(prompts, "has a default prompt, which is not added here", "put it before the texts")]
        pools = [tuple(_poolings(f) for kind, f in _modules(each) if kind == "Pooling") for each in (base, own)]
        if pools[0] != pools[1]:
            return [problem(own, f"pools by {pools[1]}, the pretrained model by {pools[0]}", "leave it out")]
        return []


def _modules(directory: Path) -> list[tuple[str, Path]]:
    """Kind and folder of the modules of a sentence encoder; none for a directory without modules.json."""
    path = directory / _MODULES
    if not path.is_file():
        return []
    modules = _read_json(path)
    if not isinstance(modules, list) or not all(isinstance(each, Mapping) for each in modules):
        raise CheckpointError(problem(path, "is no list of modules", "save the model again"))
    found = [(str(each.get("type")).rsplit(".", 1)[-1], str(each.get("path") or "")) for each in modules]
    if outside := [name for _, name in found if Path(name).name != name]:
        raise CheckpointError(problem(path, f"names '{outside[0]}'; wanted folders beside it", "save the model again"))
    if found and found[0][1]:
        remedy = "load and save it with a newer sentence-transformers, or name that folder and `pooling`"
        raise CheckpointError(problem(directory, f"has its transformer in '{found[0][1]}', not at the top", remedy))
    return [(kind, directory / name) for kind, name in found]


def _poolings(folder: Path) -> tuple[str, ...]:
    config = _read_json(folder / "config.json")
    mode = config.get("pooling_mode")
    named = [mode] if isinstance(mode, str) else [name for key, name in _MODES.items() if config.get(key)]
    if not named or any(name not in _MODES.values() for name in named):
        raise CheckpointError(problem(folder / "config.json", "names no pooling that is known here", "give `pooling`"))
    return tuple(named)


def _after_pooling(directory: Path) -> tuple[nn.Module | None, bool]:
    """The Dense layers of a sentence encoder, if any, and whether it scales embeddings to length one."""
    modules = _modules(directory)
    layers = [_dense(folder) for kind, folder in modules if kind == "Dense"]
    before = nn.Sequential(*layers).eval().requires_grad_(False) if layers else None
    return before, any(kind == "Normalize" for kind, _ in modules)


def _dense(folder: Path) -> nn.Module:
    config, state = _read_json(folder / "config.json"), open_checkpoint(folder)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
    if activation not in _ACTIVATIONS or "linear.weight" not in state:
        found = f"is a Dense layer with activation {activation!r}, or without weights"
        raise CheckpointError(problem(folder, found, f"wanted one of {', '.join(_ACTIVATIONS)}"))
    weight, bias = state["linear.weight"].float(), state["linear.bias"].float() if "linear.bias" in state else None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return nn.Sequential(layer, _ACTIVATIONS[activation]())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(problem(path, f"cannot be read ({one_line(error)})", "save the model again")) from error


FAMILY = SentenceEncoder
