"""Pickles are read as data: whole modules without their classes, and no hostile one is ever run."""

import os
import pickle
import struct
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch
from checkpoint_files import assert_same, refused, saved_pickle, small_model, torch_zip
from torch import nn

from suture.checkpoints import open_checkpoint
from suture.errors import CheckpointError

_MODELING = """
import enum, functools, pathlib
import torch
from torch import nn

class Mode(enum.Enum):
    BICUBIC = "bicubic"

def to_rgb(image):
    return image

class Preprocess:
    def __init__(self):
        self.steps = [Mode.BICUBIC, to_rgb, functools.partial(to_rgb, 1), {Mode.BICUBIC: (1, 2.5)}]
        self.cache = pathlib.Path("cache")
        self.seen = {1, 2}

class Args(dict):
    pass

class Block(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.shared = shared
        self.register_buffer("mask", torch.ones(2, 2, dtype=torch.bool))
        self.register_buffer("scratch", torch.zeros(9), persistent=False)

class ImageEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        shared = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Block(shared), Block(shared)])
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.missing = None
        self.register_parameter("absent", None)
        self.train_preprocess = Preprocess()
        self.args = Args(lr=1e-3, device=torch.device("cpu"), dtype=torch.float32, size=torch.Size([1, 2]))
"""
_SAVE = """
import torch
from src.modeling import ImageEncoder

torch.manual_seed(0)
model = ImageEncoder()
torch.save(model, "model.pt")
torch.save(model, "legacy.pt", _use_new_zipfile_serialization=False)
torch.save({"model": model, "epoch": 3}, "wrapped.pt")
torch.save(model.state_dict(), "state.pt")
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Files saved by another process with classes that do not exist in this one."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "src").mkdir()
    (folder / "src" / "modeling.py").write_text(_MODELING)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(_SAVE)], cwd=folder, env=environment, check=True)
    (folder / "src" / "modeling.py").unlink()
    return folder


@pytest.mark.parametrize("file", ["model.pt", "legacy.pt", "wrapped.pt"])
def test_a_pickled_module_of_missing_classes_gives_its_state_dict(published, file):
    checkpoint = open_checkpoint(published / file)
    assert_same(checkpoint, torch.load(published / "state.pt", weights_only=True))
    assert "src.modeling" not in sys.modules
    assert checkpoint.aliases == {
        "blocks.1.shared.bias": "blocks.0.shared.bias",
        "blocks.1.shared.weight": "blocks.0.shared.weight",
    }


def test_attributes_of_parameters_and_tensor_subclasses_do_not_matter(tmp_path):
    model = small_model()
    model[0].weight.note = "kept by _rebuild_parameter_with_state"
    torch.save(model, tmp_path / "model.pt")
    assert_same(open_checkpoint(tmp_path / "model.pt"), model.state_dict())


class _Runs:
    """An object whose pickle asks to call something."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def _build(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


_SYSTEM = b"cos\nsystem\n"
_THING = b"cthird_party\nThing\n)\x81"


def _hostile(command: str) -> dict[str, bytes]:
    """Pickles that create a file if they are run, each in its own way."""
    run = _text(command)
    python = f"__import__('os').system({command!r})"
    by_protocol = {f"reduce_{n}": pickle.dumps(_Runs(os.system, command), protocol=n) for n in range(6)}
    return by_protocol | {
        "eval": pickle.dumps(_Runs(eval, python)),
        "exec": pickle.dumps(_Runs(exec, python)),
        "popen": pickle.dumps(_Runs(subprocess.Popen, command, -1, None, None, None, None, None, False, True)),
        "nested_pickle": pickle.dumps(_Runs(pickle.loads, pickle.dumps(_Runs(os.system, command)))),
        "nested_storage": pickle.dumps(_Runs(torch.storage._load_from_bytes, b"PK")),
        "hub": b"\x80\x02ctorch.hub\nload\n" + run + b"\x85R.",
        "torch_load": b"\x80\x02ctorch\nload\n" + run + b"\x85R.",
        "inst": b"(" + run + b"ios\nsystem\n.",
        "obj": b"(" + _SYSTEM + run + b"o.",
        "newobj": _build(b"csubprocess\nPopen\n", run, b"\x85\x81"),
        "newobj_ex": _build(b"csubprocess\nPopen\n", run, b"\x85}\x92"),
        "newobj_torch": _build(b"ctorch.hub\nload\n", run, b"\x85\x81"),
        "newobj_by_copyreg": _build(b"ccopyreg\n__newobj__\n", b"csubprocess\nPopen\n", run, b"\x86R"),
        "reconstructor": _build(b"ccopyreg\n_reconstructor\n", b"csubprocess\nPopen\nNN\x87R"),
        "getattr": _build(b"cbuiltins\ngetattr\ncbuiltins\n__import__\n", _text("os"), b"\x85R\x86R", run, b"\x85R"),
        "getattr_python_2": _build(b"c__builtin__\ngetattr\n" + _THING, _text("system"), b"\x86R", run, b"\x85R"),
        "dotted_name": _build(b"\x8c\x02os\x8c\x0fsystem.__call__\x93", run, b"\x85R"),
        "setstate": _build(_THING, b"}", _text("__setstate__"), _SYSTEM, b"sb", run, b"b"),
        "setstate_of_class": _build(b"cthird_party\nThing\n", run, b"b"),
        "call_of_instance": _build(_THING, run, b"\x85R"),
        "extension": _build(b"\x82\x01", run, b"\x85R"),
        "from_type": _build(b"ctorch._tensor\n_rebuild_from_type_v2\n(", _SYSTEM, b"ctorch\nTensor\n", run, b"\x85}tR"),
        "partial": _build(b"cfunctools\npartial\n", _SYSTEM, b"\x85R"),
        "attrgetter": _build(b"coperator\nattrgetter\n", run, b"\x85R"),
        "third_party_function": _build(b"cnumpy.testing._private.utils\nrunstring\n", run, b"}\x86R"),
        "as_key": _build(b"}", _SYSTEM, run, b"\x85RNs"),
        "as_metadata": _build(b"}", _SYSTEM, run, b"\x85Rb"),
        "in_persistent_id": _build(_SYSTEM, run, b"\x85RQ"),
    }


_KINDS = list(_hostile("true"))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", _KINDS)
def test_a_hostile_pickle_is_refused_and_never_run(kind, zipped, tmp_path):
    marker = tmp_path / "it_ran"
    hostile = _hostile(f"touch {marker}")[kind]
    path = tmp_path / "x.pt"
    if zipped:
        torch_zip(path, hostile)
    else:
        path.write_bytes(hostile)
    line = refused(open_checkpoint, path, kind=CheckpointError)
    assert "is a pickle that asks" in line
    assert "it was not run" in line
    assert not marker.exists()


def test_the_refusal_names_what_the_pickle_asked_for(tmp_path):
    path = torch_zip(tmp_path / "x.pt", pickle.dumps(_Runs(os.system, "true")))
    line = refused(open_checkpoint, path, kind=CheckpointError)
    assert line.startswith(f"'{path}' is a pickle that asks to call 'posix.system'; it was not run. Remedy: ")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_attribute_of_a_module_is_refused(zipped, tmp_path):
    marker = tmp_path / "it_ran"
    model = small_model()
    model[2].hook = [_Runs(os.system, f"touch {marker}")]
    for value in (model, {"state_dict": small_model().state_dict(), "extra": model[2].hook}):
        torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        assert "posix.system" in refused(open_checkpoint, tmp_path / "x.pt", kind=CheckpointError)
    assert not marker.exists()


def test_naming_a_module_does_not_import_it(tmp_path, monkeypatch):
    (tmp_path / "loud.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    pickled = _build(b"}", _text("thing"), b"cloud\nThing\n)\x81s")
    line = refused(open_checkpoint, torch_zip(tmp_path / "x.pt", pickled), kind=CheckpointError)
    assert "holds no tensors" in line
    assert not (tmp_path / "it_ran").exists()
    assert "loud" not in sys.modules


_BOMBS = {
    "marks": b"\x80\x02" + b"(" * 100_000 + b".",
    "deep_list": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep_key": b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
    "far_memo": b"\x80\x02Nr\xff\xff\xff\xff.",
    "long_bytes": b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\x00abc.",
    "long_bytearray": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00abc.",
    "bytearray_of_size": _build(b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R"),
    "list_of_range": _build(b"cbuiltins\nlist\ncbuiltins\nrange\nJ\xff\xff\xff\x7f\x85R\x85R"),
    "no_end": b"\x80\x02}",
    "empty_stack": b"\x80\x02.",
    "future": b"\x80\x09N.",
}


@pytest.mark.parametrize("kind", _BOMBS)
def test_a_pickle_made_to_exhaust_memory_is_refused(kind, tmp_path):
    refused(open_checkpoint, torch_zip(tmp_path / "x.pt", _BOMBS[kind]), kind=CheckpointError)
    (tmp_path / "y.pt").write_bytes(_BOMBS[kind])
    refused(open_checkpoint, tmp_path / "y.pt", kind=CheckpointError)


def test_a_tangle_of_modules_is_refused(tmp_path):
    model: nn.Module = nn.Linear(1, 1)
    for _ in range(40):
        model = nn.ModuleDict({"a": model, "b": model})
    torch.save(model, tmp_path / "tangle.pt")
    assert "too many parts" in refused(open_checkpoint, tmp_path / "tangle.pt", kind=CheckpointError)


def test_a_module_that_contains_itself_is_refused(tmp_path):
    model = nn.Module()
    model._modules["me"] = model
    torch.save(model, tmp_path / "loop.pt")
    assert "contains itself" in refused(open_checkpoint, tmp_path / "loop.pt", kind=CheckpointError)


@pytest.mark.parametrize("claimed", [(5,), (1 << 40,), (4, 1 << 30)])
def test_a_tensor_that_claims_more_than_its_record_is_refused(claimed, tmp_path):
    honest = saved_pickle({"w": torch.zeros(4)})
    shape = b"".join(b"\x8a\x08" + size.to_bytes(8, "little") for size in claimed)
    forged = honest.replace(b"K\x04\x85", b"(" + shape + b"t", 1)
    if len(claimed) == 2:
        forged = forged.replace(b"K\x01\x85", b"K\x00K\x01\x86", 1)
    assert forged != honest
    path = torch_zip(tmp_path / "x.pt", forged, {"0": bytes(16)})
    assert "its record holds 16" in refused(open_checkpoint, path, kind=CheckpointError)


def test_a_zip_file_that_is_not_of_torch_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    assert "not one that PyTorch saved" in refused(open_checkpoint, tmp_path / "photos.zip", kind=CheckpointError)


def test_the_program_of_a_torchscript_archive_is_not_read(tmp_path):
    path = torch_zip(tmp_path / "x.pt", pickle.dumps({}), **{"constants.pkl": b"", "code/model.py": b"raise"})
    assert "holds no tensors" in refused(open_checkpoint, path, kind=CheckpointError)


def test_another_byte_order_is_refused(tmp_path):
    path = torch_zip(tmp_path / "x.pt", pickle.dumps({}), byteorder=b"big")
    assert "byte order" in refused(open_checkpoint, path, kind=CheckpointError)


def test_a_compressed_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}) * 100)
    assert "is compressed" in refused(open_checkpoint, tmp_path / "x.pt", kind=CheckpointError)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"epoch": 3, "lr": 0.1}, "holds no tensors, only: epoch, lr"),
        ({}, "holds no tensors, only: nothing"),
        ({"w": torch.ones(2), "epoch": 3}, "holds an object of int, not a tensor, under 'epoch'"),
        ({1: torch.ones(2)}, "has the key 1, which is an object of int and no name"),
        ({"state_dict": {"n": 3}}, "holds no tensors"),
        ([torch.ones(2)], "holds an object of list, not a state dict or a module"),
        (torch.ones(2), "holds a tensor, not a state dict or a module"),
        ({"w": torch.ones(2).to_sparse()}, "holds a sparse tensor under 'w'"),
        ({"w": torch.ones(2, device="meta")}, "holds a meta tensor, which has no values under 'w'"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "unsupported dtype complex64 under 'w'"),
    ],
)
def test_what_holds_no_plain_weights_is_refused(value, message, tmp_path):
    torch.save(value, tmp_path / "x.pt")
    assert message in refused(open_checkpoint, tmp_path / "x.pt", kind=CheckpointError)


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"w": 1}))
    assert "plain pickle of a dict" in refused(open_checkpoint, tmp_path / "x.pkl", kind=CheckpointError)


def test_entries_beside_a_wrapped_state_dict_are_left_aside(tmp_path):
    state = small_model().state_dict()
    for wrapper in ("state_dict", "model", "module"):
        torch.save({wrapper: {**state, "note": "x"}, "epoch": 3, "seed": torch.tensor(1)}, tmp_path / "x.pt")
        assert_same(open_checkpoint(tmp_path / "x.pt"), state)
