"""GGUF files: plain tensors as they are, blocks of codes as llama.cpp's own package decodes them, damage refused."""

import struct

import numpy as np
import pytest
import tiny_llama
import torch
from gguf_writing import write

from suture import merge_files, open_checkpoint
from suture.errors import CheckpointError, ConfigError

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
KINDS = [
    kind for kind in gguf.GGMLQuantizationType if kind.name not in ("F32", "F16", "F64", "I8", "I16", "I32", "I64")
]


def decodable(kind):
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (NotImplementedError, KeyError):
        return False
    return True


DECODED = [kind for kind in KINDS if decodable(kind) and kind.name != "BF16"]


def blocks(kind, rows=5, per_row=3, seed=0):
    """Random codes whose scales are ordinary numbers."""
    width = gguf.GGML_QUANT_SIZES[kind][1]
    values = np.random.default_rng(seed).integers(0, 60, (rows, per_row * width)).astype(np.uint8)
    return values


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
def test_blocks_are_decoded_as_the_package_decodes_them_slice_by_slice(kind, tmp_path):
    stored = blocks(kind)
    opened = open_checkpoint(write(tmp_path / "x.gguf", {}, {"w": (stored, kind)}))
    wanted = torch.from_numpy(gguf.quants.dequantize(stored, kind))
    assert opened.specs["w"].shape == tuple(wanted.shape)
    assert f"{kind.name} blocks of GGUF" in opened.decoded
    flat = opened.flat("w")
    same = lambda one, other: torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
    assert same(flat[:].view(wanted.shape), wanted)
    for start, stop in (
        (0, 1),
        (5, 6),
        (3, 47),
        (wanted.shape[1] - 1, wanted.shape[1] + 1),
        (wanted.numel() - 9, None),
    ):
        assert same(flat[start:stop], wanted.view(-1)[start:stop])


def test_plain_tensors_have_their_shape_dtype_and_values(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
        "c": np.arange(5, dtype=np.int32),
    }
    opened = open_checkpoint(write(tmp_path / "x.gguf", arrays))
    assert set(opened) == set(arrays)
    assert all(torch.equal(opened[name], torch.from_numpy(array)) for name, array in arrays.items())
    assert opened.metadata["general.architecture"] == "llama"
    assert not opened.decoded


def test_a_merge_of_gguf_files_is_that_of_their_decoded_copies(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    made = {}
    for seed, name in enumerate(("base", "one", "two")):
        weight = np.random.default_rng(seed).standard_normal((8, 64)).astype(np.float32)
        norm = np.random.default_rng(seed).standard_normal(8).astype(np.float32)
        raw = {"blk.0.w": (gguf.quants.quantize(weight, kind), kind)}
        made[name] = write(tmp_path / f"{name}.gguf", {"blk.0.norm": norm}, raw)
    plain = {
        name: {n: open_checkpoint(path).flat(n)[:].view(s.shape) for n, s in open_checkpoint(path).specs.items()}
        for name, path in made.items()
    }
    options = {"dtype": "float32", "scaling_factor": 0.7}
    found = merge_files(made["base"], [made["one"], made["two"]], "task_arithmetic", tmp_path / "f", **options)
    wanted = merge_files(plain["base"], [plain["one"], plain["two"]], "task_arithmetic", tmp_path / "w", **options)
    same = tiny_llama.tensors(wanted)
    assert all(torch.equal(tensor, same[name]) for name, tensor in tiny_llama.tensors(found).items())
    with pytest.raises(ConfigError, match="Q8_0 blocks of GGUF, which are read and not written"):
        merge_files(made["base"], [made["one"]], "task_arithmetic", tmp_path / "no", encode="input")


def test_a_folder_with_one_gguf_file_is_that_model(tmp_path):
    write(tmp_path / "model-q8.gguf", {"a": np.ones(3, np.float32)})
    assert open_checkpoint(tmp_path)["a"].tolist() == [1, 1, 1]


def test_without_the_package_codes_are_refused_and_plain_files_are_read(tmp_path, monkeypatch):
    kind = gguf.GGMLQuantizationType.Q4_0
    coded = write(tmp_path / "coded.gguf", {}, {"w": (blocks(kind), kind)})
    plain = write(tmp_path / "plain.gguf", {"a": np.ones(3, np.float32)})
    monkeypatch.setattr("suture.checkpoints.gguf_files.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"the gguf package decodes. Remedy: pip install 'suture\[gguf\]'"):
        open_checkpoint(coded)
    assert open_checkpoint(plain)["a"].tolist() == [1, 1, 1]


def test_every_cut_and_every_changed_byte_is_refused_in_one_line_or_read(tmp_path):
    kind = gguf.GGMLQuantizationType.Q4_0
    whole = write(tmp_path / "x.gguf", {"a": np.ones((2, 3), np.float32)}, {"w": (blocks(kind), kind)}).read_bytes()
    file, refused = tmp_path / "y.gguf", 0
    cut = [whole[:size] for size in range(4, len(whole), 3)]
    changed = [whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :] for at in range(4, 500) for flip in (1, 255)]
    for content in cut + changed:
        file.write_bytes(content)
        try:
            opened = open_checkpoint(file)
            for name in opened:
                opened[name]
        except CheckpointError as error:
            refused += 1
            assert str(error).isprintable()  # noqa: PT017
    assert refused > len(cut)


def test_a_count_beyond_all_files_ends_at_once(tmp_path):
    file = tmp_path / "x.gguf"
    for counts in ((2**60, 0), (0, 2**60)):
        file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(50))
        with pytest.raises(CheckpointError, match="is a GGUF file and"):
            open_checkpoint(file)
