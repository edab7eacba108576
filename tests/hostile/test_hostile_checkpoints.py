"""Thousands of bad checkpoints: each is read, or refused in one line with a remedy, within bounds, leaving nothing."""

import io
import json
import os
import pickletools
import random
import struct
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import safetensors.torch
import torch
from checkpoint_files import refused, safetensors_bytes, small_model, torch_zip
from hostile import VALUES, cases, damaged, mutated, tried
from hypothesis import given, settings
from hypothesis import strategies as st

import suture
from suture.checkpoints import open_checkpoint, open_fine_tuned
from suture.errors import CheckpointError


def read(source, **options):
    """Open a checkpoint and read every tensor of it."""
    return dict(open_checkpoint(source, **options))


def header() -> dict:
    """A header of three tensors that lie in 48 bytes."""
    entry = lambda dtype, shape, begin, end: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return {
        "__metadata__": {"format": "pt", "aliases": '{"c":"a"}'},
        "a": entry("F32", [2, 3], 0, 24),
        "b": entry("F16", [4], 24, 32),
        "n": entry("I64", [2], 32, 48),
    }


@pytest.mark.parametrize("number", cases(90, 800))
def test_safetensors_headers(number, tmp_path):
    dice = random.Random(f"header {number}")
    content = header()
    for _ in range(dice.choice((1, 1, 2))):
        content = mutated(dice, content)
    text = json.dumps(content).encode() if dice.random() < 0.8 else damaged(dice, json.dumps(header()).encode())
    whole = safetensors_bytes(text, bytes(48))
    (tmp_path / "x.safetensors").write_bytes(damaged(dice, whole) if dice.random() < 0.2 else whole)
    tried(lambda: read(tmp_path / "x.safetensors"), tmp_path)


@pytest.mark.parametrize("number", cases(50, 400))
def test_indexes_of_shards(number, tmp_path):
    dice = random.Random(f"index {number}")
    state = small_model().state_dict()
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, "x.safetensors")}
    content = json.dumps(mutated(dice, index)).encode()
    index_file = tmp_path / "model.safetensors.index.json"
    index_file.write_bytes(damaged(dice, content) if dice.random() < 0.3 else content)
    tried(lambda: read(tmp_path), tmp_path)


CONFIG = {
    **{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "fan_in_fan_out": False, "bias": "none"},
    **{"rank_pattern": {"first": 2}, "alpha_pattern": {"first": 7}, "init_lora_weights": True, "modules_to_save": None},
    **{"target_modules": ["first"], "layers_to_transform": None, "use_dora": False, "target_parameters": None},
    **{"alora_invocation_tokens": None, "trainable_token_indices": None, "layer_replication": None},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["F32", "dtype"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIXED = settings(max_examples=80, derandomize=True, deadline=None, database=None)


@FIXED
@given(JSON, JSON, JSON)
def test_any_json_in_the_place_of_a_tensor(dtype, shape, offsets):
    with TemporaryDirectory() as folder:
        content = {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}, "v": dtype}
        (Path(folder) / "x.safetensors").write_bytes(safetensors_bytes(content, bytes(8)))
        assert tried(lambda: read(Path(folder) / "x.safetensors"), Path(folder)) is not None


@FIXED
@given(st.dictionaries(st.sampled_from([*CONFIG, "new"]), JSON, max_size=3))
def test_any_json_in_the_configuration_of_an_adapter(changes):
    with TemporaryDirectory() as folder:
        tensors = {f"base_model.model.h.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
        safetensors.torch.save_file(tensors, Path(folder) / "adapter_model.safetensors")
        (Path(folder) / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
        base = open_checkpoint({"h.weight": torch.zeros(2, 2)})
        tried(lambda: dict(open_fine_tuned(folder, base)), Path(folder))


OPCODES = [code.code.encode("latin1") for code in pickletools.opcodes]
NAMES = (
    *("os system", "builtins eval", "builtins list", "builtins tuple", "builtins set", "builtins bytearray"),
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage", "third.party Thing"),
    *("copyreg _reconstructor", "functools partial", "torch.nn.modules.linear Linear", "builtins range"),
)


def opcode(dice: random.Random) -> bytes:
    """One opcode with an argument that fits it, or with one that does not."""
    module, _, name = dice.choice(NAMES).partition(" ")
    text = dice.choice([v for v in VALUES if isinstance(v, str) and "\ud800" not in v]).encode()
    return dice.choice(
        (
            *(b"c" + module.encode() + b"\n" + name.encode() + b"\n",) * 3,
            b"X" + struct.pack("<I", len(text)) + text,
            b"K" + bytes([dice.randrange(256)]),
            b"J" + struct.pack("<i", dice.choice((0, 1, -1, 2**31 - 1))),
            b"\x8a\x09" + dice.randbytes(9),
            b"q" + bytes([dice.randrange(4)]),
            b"h" + bytes([dice.randrange(4)]),
            b"\x94",
            *(dice.choice((b"(", b"]", b"}", b")", b"N", b"\x88", b"\x8f")),) * 4,
            *(dice.choice((b"t", b"\x85", b"\x86", b"\x87", b"e", b"a", b"s", b"u", b"R", b"\x81", b"b", b"Q", b"d")),)
            * 5,
            dice.choice(OPCODES) + dice.randbytes(dice.randrange(5)),
        )
    )


def pickled(dice: random.Random, marker: str) -> bytes:
    """A random program of pickle's opcodes, a damaged state dict, or a tangle of modules."""
    kind = dice.random()
    if kind < 0.5:
        return b"\x80\x02" + b"".join(opcode(dice) for _ in range(dice.choice((3, 10, 60, 400)))) + b"."
    stream = io.BytesIO()
    holder = {"state_dict": small_model().state_dict(), "epoch": 3}
    torch.save(dice.choice((holder, holder["state_dict"], small_model(), tangle(dice))), stream)
    with zipfile.ZipFile(stream) as archive:
        whole = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    if kind < 0.6:
        call = b"cos\nsystem\nX" + struct.pack("<I", len(marker)) + marker.encode() + b"\x85R0"
        place = whole.index(b"\x80") + 2
        return whole[:place] + call + whole[place:]
    return damaged(dice, whole)


def tangle(dice: random.Random) -> torch.nn.Module:
    """Modules that hold each other, with a number of paths that is out of bounds."""
    model: torch.nn.Module = dice.choice((torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Identity()))
    for _ in range(dice.choice((3, 40, 90))):
        model = torch.nn.ModuleDict({"a": model, "b": model})
    return model


@pytest.mark.parametrize("number", cases(110, 1000))
def test_pickles(number, tmp_path):
    dice = random.Random(f"pickle {number}")
    marker = tmp_path / "it_ran"
    content = pickled(dice, f"touch {marker}")
    if dice.random() < 0.6:
        torch_zip(tmp_path / "x.pt", content, {"0": bytes(64), "1": bytes(64)})
    else:
        (tmp_path / "x.pt").write_bytes(content)
    tried(lambda: read(tmp_path / "x.pt"), tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("number", cases(20, 150))
def test_files_of_torch(number, tmp_path):
    dice = random.Random(f"torch {number}")
    torch.save(small_model().state_dict(), tmp_path / "x.pt", _use_new_zipfile_serialization=dice.random() < 0.6)
    (tmp_path / "x.pt").write_bytes(damaged(dice, (tmp_path / "x.pt").read_bytes()))
    tried(lambda: read(tmp_path / "x.pt"), tmp_path)


def repeated(call: bytes, times: int) -> bytes:
    """A long list in the memo, and a call that copies it, many times over."""
    long_list = b"(" + b"N" * 200_000 + b"lq\x00"
    return b"\x80\x02" + long_list + b"0](" + (call + b"h\x00\x85R") * times + b"e."


BOMBS = {
    "lists that are copied": repeated(b"cbuiltins\nlist\n", 5000),
    "sets that are copied": repeated(b"cbuiltins\nset\n", 5000),
    "a long key used often": b"\x80\x02(" + b"N" * 100_000 + b"tq\x000}(" + b"h\x00N" * 100_000 + b"u.",
    "a long number as a key": b"\x80\x02\x8b" + struct.pack("<i", 500_000) + b"\x7f" * 500_000 + b"q\x000}("
    + b"h\x00N" * 100_000 + b"u.",
    "a state given to many objects": b"\x80\x02}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(50_000))
    + b"uq\x000(" + b"cthird\nThing\n)\x81h\x00b" * 20_000 + b"l.",
    "a shape of many dimensions": b"\x80\x02(" + b"K\x01" * 200_000 + b"tq\x000]("
    + b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00h\x00h\x00\x89}tR" * 2000 + b"e.",
    "a text that is encoded often": b"\x80\x02X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000 + b"q\x000]("
    + b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R" * 20_000 + b"e.",
    "very many opcodes": b"\x80\x02" + b"N0" * 3_000_000 + b"N.",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickles_that_ask_for_endless_work(bomb, tmp_path):
    torch_zip(tmp_path / "x.pt", BOMBS[bomb])
    assert tried(lambda: read(tmp_path / "x.pt"), tmp_path) is not None


PARTS = (
    *("lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_B.bias", "lora_embedding_A", "weight", "bias"),
    *("lora_magnitude_vector", "token_adapter.trainable_tokens_delta", "hada_w1_a", "lokr_w1", "ia3_l"),
    *("vera_lambda_b", "modules_to_save.weight", "base_layer.weight"),
)


@pytest.mark.parametrize("number", cases(60, 600))
def test_adapters(number, tmp_path):
    dice = random.Random(f"adapter {number}")
    tensors = {
        f"base_model.model.first.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("A", (2, 5)), ("B", (5, 2)))
    }
    if dice.random() < 0.5:
        module = dice.choice(("first", "last", "elsewhere", ""))
        shape = dice.choice(((2, 5), (5, 2), (5,), (), (0, 5), (5, 5), (2, 5, 1)))
        dtype = dice.choice((torch.float32, torch.int8, torch.bfloat16))
        tensors[f"base_model.model.{module}.{dice.choice(PARTS)}"] = torch.ones(shape).to(dtype)
    if dice.random() < 0.2:
        del tensors[dice.choice(list(tensors))]
    config = CONFIG
    for _ in range(dice.choice((1, 1, 2))):
        config = mutated(dice, config)
    content = json.dumps(config).encode()
    (tmp_path / "adapter_config.json").write_bytes(damaged(dice, content) if dice.random() < 0.15 else content)
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    base = open_checkpoint(
        {"first.weight": torch.zeros(5, 5), "last.weight": torch.zeros(4, 5), "last.bias": torch.ones(4)}
    )
    tried(lambda: dict(open_fine_tuned(tmp_path, base, label="mine")), tmp_path)


MODEL_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 3,
    "quantization_config": None,
}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []},
    "added_tokens": [{"id": 2, "content": "c"}],
}


@pytest.mark.parametrize("number", cases(40, 400))
def test_model_directories(number, tmp_path):
    dice = random.Random(f"directory {number}")
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        tensors = {"model.embed_tokens.weight": torch.ones(3, 2), "h.weight": torch.ones(2, 2)}
        safetensors.torch.save_file(tensors, tmp_path / name / "model.safetensors")
        for file, content in (("config.json", MODEL_CONFIG), ("tokenizer.json", TOKENIZER)):
            hostile = dice.random() < 0.5
            content = json.dumps(mutated(dice, content) if hostile else content).encode()
            content = dice.choice((b"", b"\xff", b"[" * 100_000, b"[]", b"null")) if dice.random() < 0.1 else content
            (tmp_path / name / file).write_bytes(content)
    tried(lambda: suture.merge(tmp_path / "base", {"tuned": tmp_path / "tuned"}, "simple_average"), tmp_path)


INSIDE = ("dangling.pt", "loop.pt", "empty", "folder.safetensors", "gguf", "pipe.pt", "dangling", "looping")
ELSEWHERE = {
    "long": "a" * 5000,
    "long, below": "x/" + "a" * 5000,
    "very long, below": "/".join(["a" * 200] * 30),
    "long id": f"org/{'a' * 5000}",
    "zero byte": "a\0b",
    "bytes": os.fsdecode(b"m\xff.pt"),
    "below a file": f"{__file__}/x.pt",
    "nothing": "",
    "a device": "/dev/zero",
    "home of nobody": "~nobody-of-that-name/x.pt",
    "zoo": "zoo:nowhere/x",
    "zoo alone": "zoo:",
    "zoo outside": "zoo:glyphs8/../../x",
    "control": "\x1b[31m.pt",
}


def awkward_paths(folder) -> None:
    """Make what INSIDE names: links to nowhere and to themselves, a pipe, folders without weights."""
    (folder / "dangling.pt").symlink_to(folder / "nowhere")
    (folder / "loop.pt").symlink_to(folder / "loop.pt")
    (folder / "empty").mkdir()
    (folder / "folder.safetensors").mkdir()
    (folder / "gguf").mkdir()
    (folder / "gguf" / "x.gguf").write_bytes(b"GGUF")
    os.mkfifo(folder / "pipe.pt")
    for name, target in (("dangling", "gone"), ("looping", "tokenizer.json")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        safetensors.torch.save_file({"w": torch.ones(1)}, folder / name / "model.safetensors")
        (folder / name / "tokenizer.json").symlink_to(folder / name / target)


@pytest.mark.parametrize("path", [*INSIDE, *ELSEWHERE])
def test_paths(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    awkward_paths(tmp_path)
    path = ELSEWHERE.get(path, path)
    assert tried(lambda: read(path), tmp_path) is not None
    assert tried(lambda: dict(open_fine_tuned(path, open_checkpoint({}))), tmp_path) is not None


def test_names_of_models_with_bytes_that_are_no_text(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    assert tried(lambda: read(tmp_path / "x.safetensors", label=os.fsdecode(b"m\xff")), tmp_path) is not None


@pytest.mark.parametrize("method", ["open", "iterdir"])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_what_may_not_be_read(error, method, tmp_path, monkeypatch):
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    path = tmp_path / "x.safetensors" if method == "open" else tmp_path

    def refuse(*arguments, **options):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(f"pathlib.Path.{method}", refuse)
        line = refused(read, path, kind=CheckpointError)
    assert error.strerror in line


@pytest.mark.parametrize("what", [None, 5, 0.5, [], [1], (), b"x", object, True])
def test_objects_that_are_no_models(what, tmp_path):
    assert tried(lambda: open_checkpoint(what), tmp_path) is not None


def test_the_generators_are_the_same_every_time():
    first, second = (random.Random("header 3") for _ in range(2))
    assert repr(mutated(first, header())) == repr(mutated(second, header()))
