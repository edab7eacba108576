"""The test kit: suture's own families pass it, and families that break a law do not."""

import pytest
import torch
from desk import CLASSES as DIGITS
from desk import write_idx
from language_shop import build_shop
from test_families_image_classification import CLASSES as PICTURES
from test_families_image_classification import shop  # noqa: F401
from test_families_module import CODE, NAMES, nets  # noqa: F401
from test_families_pooled import make_sentence, shelf  # noqa: F401
from test_families_seq2seq import shop as t5_shop  # noqa: F401
from test_families_seq2seq import task_of as t5_task
from tiny_clip import save_tiny_clip
from tiny_texts import TASKS

from suture.checkpoints import open_checkpoint, open_fine_tuned
from suture.families.causal_lm import CausalLM
from suture.families.clip import Clip
from suture.families.image_classification import ImageClassification
from suture.families.module import ModuleFamily
from suture.families.sentence_encoder import SentenceEncoder
from suture.families.seq2seq import Seq2Seq
from suture.families.sequence_classification import SequenceClassification
from suture.families.testing import check_family
from suture.tasks import Task

POINTS = ("a", "b", "c")


def texts_of(folder, names=("colour", "animal")):
    return [Task(name, str(folder / "data" / name), TASKS[name], text_columns=("second",)) for name in names]


@pytest.fixture
def module_family(nets, tmp_path):  # noqa: F811
    (tmp_path / "nets.py").write_text(CODE)

    def make(family=ModuleFamily, **settings):
        settings = {"module": f"{tmp_path}/nets.py:make", "arguments": {"width": 32}} | settings
        experts = {name: open_checkpoint(nets / f"{name}.pt") for name in NAMES}
        return family(None, open_checkpoint(nets / "base.pt"), settings, experts)

    return make


def points(nets):  # noqa: F811
    return [Task(name, str(nets / "data" / name), POINTS) for name in NAMES]


@pytest.mark.parametrize("settings", [{}, {"head": "head"}])
def test_modules_of_one_s_own_pass(module_family, nets, tmp_path, settings):  # noqa: F811
    check_family(module_family(**settings), points(nets), tmp_path / "model")


def test_text_classifiers_pass(text_shop, tmp_path):
    experts = {name: open_checkpoint(text_shop / name) for name in ("colour", "animal")}
    check_family(SequenceClassification(text_shop / "base", experts=experts), texts_of(text_shop), tmp_path / "model")


def test_encoders_without_a_head_and_sentence_encoders_pass(shelf, tmp_path):  # noqa: F811
    experts = {name: open_checkpoint(shelf / name) for name in ("colour", "animal")}
    heads = {name: str(shelf / f"{name}-head.safetensors") for name in experts}
    check_family(
        SequenceClassification(shelf / "base", settings={"heads": heads}, experts=experts),
        texts_of(shelf),
        tmp_path / "model",
    )
    check_family(
        SentenceEncoder(shelf / "base", settings={"pooling": "mean"}, experts=experts),
        texts_of(shelf),
        tmp_path / "two",
    )


def test_image_classifiers_pass(shop, tmp_path):  # noqa: F811
    experts = {name: open_checkpoint(shop / name) for name in PICTURES}
    tasks = [Task(name, str(shop / "data" / name), names) for name, names in PICTURES.items()]
    check_family(ImageClassification(shop / "base", experts=experts), tasks, tmp_path / "model")


def test_clip_passes(tmp_path):
    base = save_tiny_clip(tmp_path / "base")
    write_idx(tmp_path / "data", torch.Generator().manual_seed(0))
    task = Task("digits", str(tmp_path / "data"), tuple(DIGITS), ("a {}.",))
    check_family(Clip(base), [task], tmp_path / "model")


def test_causal_language_models_pass_with_adapters_and_experts_of_their_own(tmp_path):
    for kind, lora in (("llama", True), ("gemma", False), ("mixtral", False)):
        folder = build_shop(tmp_path / kind, kind, lora=lora)
        base = CausalLM(folder / "base")
        names = ("colour", "animal")
        experts = {name: base.in_memory(open_fine_tuned(folder / name, base.weights)) for name in names}
        tasks = [
            Task(name, str(folder / "data" / name), text_columns=("text",), score="bits_per_byte") for name in names
        ]
        check_family(CausalLM(folder / "base", experts=experts), tasks, tmp_path / f"{kind}-model")


def test_t5_passes(t5_shop, tmp_path):  # noqa: F811
    base = open_checkpoint(t5_shop / "base")
    experts = {name: open_fine_tuned(t5_shop / name, base) for name in ("colour", "animal")}
    tasks = [t5_task(t5_shop / "data" / name, name) for name in experts]
    check_family(Seq2Seq(t5_shop / "base", base, experts=experts), tasks, tmp_path / "model")


class Shared(ModuleFamily):
    """Gives the same encoder to everybody."""

    def encoder(self, state=None):
        return self._encoder.load(self.weights if state is None else state)


class Learning(ModuleFamily):
    """Leaves its encoder in training mode, where BatchNorm looks at the whole batch."""

    def encoder(self, state=None):
        return super().encoder(state).train()


class Renaming(ModuleFamily):
    """Does not know its own canonical names."""

    def canonical_names(self, names):
        return {f"net.{name}": stored for name, stored in super().canonical_names(names).items()}


class Loose(ModuleFamily):
    """Takes a state without some of its tensors."""

    def encoder(self, state=None):
        encoder = super().encoder()
        encoder.load = lambda state: (encoder.load_state_dict(dict(state), strict=False), encoder)[1]
        return encoder if state is None else encoder.load(state)


class Forgetful(ModuleFamily):
    """Saves the pretrained weights instead of the merged ones."""

    def save(self, state, out):
        super().save(self.encoder().state_dict(), out)


class Wide(ModuleFamily):
    """Its heads have a class too many."""

    def head(self, task, track=None):
        from suture.core.head import Head

        return Head(torch.zeros(len(task.classnames) + 1, 3))


@pytest.mark.parametrize(
    ("family", "law"),
    [
        (Shared, "share weights"),
        (Learning, "not in evaluation mode"),
        (Renaming, "does not leave canonical names"),
        (Loose, "takes a state without"),
        (Forgetful, "other features than the merged one"),
        (Wide, "gives logits of shape"),
    ],
)
def test_families_that_break_a_law_fail(module_family, nets, tmp_path, family, law):  # noqa: F811
    with pytest.raises(AssertionError, match=law):
        check_family(module_family(family), points(nets), tmp_path / "model")
