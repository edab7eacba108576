"""What cannot be read is refused in one line that says what was found and what to do."""

import json

import pytest
import safetensors.torch
import torch
from checkpoint_files import refused, safetensors_bytes, small_model
from torch import nn

from suture.checkpoints import open_checkpoint
from suture.errors import CheckpointError


def _refused(source, **options) -> str:
    return refused(open_checkpoint, source, kind=CheckpointError, **options)


@pytest.fixture
def saved(tmp_path):
    """The three kinds of file of one small model."""
    state = small_model().state_dict()
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    torch.save(state, tmp_path / "x.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    return tmp_path


@pytest.mark.parametrize("file", ["x.safetensors", "x.pt", "legacy.pt"])
def test_a_file_truncated_anywhere_is_refused_in_one_line(file, saved):
    whole = (saved / file).read_bytes()
    for kept in sorted({1, 5, 9, 40, len(whole) // 2, len(whole) - 100, len(whole) - 1}):
        (saved / file).write_bytes(whole[:kept])
        assert str(saved / file) in _refused(saved / file)


@pytest.mark.parametrize("file", ["x.safetensors", "x.pt", "legacy.pt"])
def test_a_file_with_damaged_bytes_is_read_or_refused_but_never_crashes(file, saved):
    whole = (saved / file).read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        (saved / file).write_bytes(damaged)
        try:
            dict(open_checkpoint(saved / file))
        except CheckpointError as error:
            assert str(error).isprintable()  # noqa: PT017


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (bytes(5000), "starts with nothing but zeros"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page, not the weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "is a git-lfs pointer"),
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
    ],
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "pytorch_model.bin"])
def test_what_is_in_place_of_the_weights_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert message in _refused(tmp_path / name)


def test_an_unknown_format_is_refused(tmp_path):
    (tmp_path / "x.weights").write_bytes(b"\x01\x02 something else entirely")
    assert "is no checkpoint; it starts with the bytes 01 02" in _refused(tmp_path / "x.weights")
    (tmp_path / "x.pt").write_bytes(b"\x01\x02 something else entirely")
    assert "is truncated, corrupt or no PyTorch file" in _refused(tmp_path / "x.pt")


def _entry(begin: int, end: int, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        (b"{nonsense", 0, "corrupt safetensors header"),
        (b"[1, 2]   ", 0, "has a list for a safetensors header"),
        (b"[" * 5000, 0, "corrupt safetensors header"),
        (b'{"a":{}, "a":{}}', 0, "a name is given twice"),
        ({"a": 3}, 0, "does not say where 'a' is"),
        ({"a": _entry(0, 8, dtype="C64")}, 8, "stores 'a' with the unsupported dtype C64"),
        ({"a": _entry(0, 8, dtype=["F32"])}, 8, "unsupported dtype"),
        ({"a": _entry(0, 8, shape=(-2,))}, 8, "no whole numbers"),
        ({"a": _entry(0, 8, shape=(2.0,))}, 8, "no whole numbers"),
        ({"a": _entry(0, 8, shape=(3,))}, 8, "keeps 8 bytes for 'a', but F32 [3] takes 12"),
        ({"a": _entry(8, 0)}, 8, "keeps -8 bytes for 'a'"),
        ({"a": _entry(0, 8), "b": _entry(4, 12)}, 12, "'b' at byte 4 overlaps the tensor before it"),
        ({"a": _entry(0, 8), "b": _entry(9, 17)}, 17, "'b' at byte 9 leaves a gap before it"),
        ({"a": _entry(0, 8)}, 7, "is truncated: its tensors take 8 bytes, but it holds 7"),
        ({"a": _entry(0, 8)}, 9, "is followed by something else"),
        ({"__metadata__": {"n": 1}, "a": _entry(0, 8)}, 8, "metadata that is not a mapping from text"),
        ({"__metadata__": {"aliases": "[]"}, "a": _entry(0, 8)}, 8, "corrupt record of tied names"),
        ({"__metadata__": {"aliases": '{"b":"c"}'}, "a": _entry(0, 8)}, 8, "corrupt record of tied names"),
        ({"a\n\x1b[31m": _entry(0, 4)}, 4, "keeps 4 bytes"),
        ({"a": _entry(0, 8, shape=(10**4000, 10**4000))}, 8, "larger than any tensor can have"),
        ({"a": _entry(0, 0, shape=(0, 2**63))}, 0, "larger than any tensor can have"),
        ({"a": _entry(0, 0, shape=(0, 2**40, 2**40))}, 0, "larger than any tensor can have"),
        ({"a": _entry(2**64, 2**64 + 8)}, 8, "larger than any tensor can have"),
        ({"a": _entry(0, 8, shape=(True, 2))}, 8, "no whole numbers"),
        ({"\ud800": _entry(0, 8)}, 8, "which is not valid Unicode"),
    ],
)
def test_a_safetensors_header_that_lies_is_refused(header, size, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(header, bytes(size)))
    assert message in _refused(path)


def test_a_header_longer_than_its_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}" * 50)
    assert "is truncated or no safetensors file" in _refused(path)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(saved):
    checkpoint = open_checkpoint(saved / "x.safetensors")
    (saved / "x.safetensors").write_bytes((saved / "x.safetensors").read_bytes()[:-20])
    line = refused(lambda: [checkpoint[name] for name in checkpoint], kind=CheckpointError)
    assert "became shorter" in line


def test_a_missing_path_is_refused(tmp_path):
    assert "does not exist" in _refused(tmp_path / "no.safetensors")
    assert "does not exist" in _refused("no_such_folder/no.pt")
    assert "does not exist" in _refused(str(tmp_path / "no"))


def test_an_unreadable_source_is_refused(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    assert "has no weight file" in _refused(tmp_path / "folder.pt")


def test_a_directory_of_several_unknown_weight_files_is_refused(saved):
    assert "has several weight files (legacy.pt, x.pt, x.safetensors)" in _refused(saved)


def test_an_unfinished_result_is_never_taken_for_weights(saved):
    (saved / "x.safetensors").rename(saved / ".model.safetensors.12-ab.partial")
    (saved / "x.pt").rename(saved / ".model.safetensors")
    (saved / "legacy.pt").unlink()
    assert "has no weight file" in _refused(saved)


def _index(folder, weight_map) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_shard_is_named(saved):
    _index(saved, {"0.weight": "x.safetensors", "9.weight": "y.safetensors"})
    assert "lacks 1 of its 2 shards, the first is 'y.safetensors'" in _refused(saved)


def test_a_tensor_that_its_shard_lacks_is_named(saved):
    _index(saved, {"0.weight": "x.safetensors", "9.weight": "x.safetensors"})
    assert "lacks '9.weight', which 'model.safetensors.index.json' says it holds" in _refused(saved)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "..", "", 3, "a\\b", "a" * 5000, "a\0b", "\ud800"])
def test_a_shard_outside_its_directory_is_refused(file, saved):
    _index(saved, {"0.weight": file})
    assert "does not lead from names to files beside it" in _refused(saved)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_a_damaged_index_is_refused(text, saved):
    (saved / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in _refused(saved)


def test_a_name_in_two_shards_and_not_in_the_index_is_refused(saved):
    (saved / "y.safetensors").write_bytes((saved / "x.safetensors").read_bytes())
    _index(saved, {"0.weight": "x.safetensors", "0.bias": "y.safetensors"})
    assert "does not say which of two shards holds" in _refused(saved)


def test_a_revision_of_something_on_disk_is_refused(saved):
    assert "has no revision 'v2'" in _refused(saved / "x.pt", revision="v2")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": torch.ones(2).to_sparse()}, "sparse or nested tensor (sparse_coo) under 'w'"),
        ({"w": torch.ones(2, device="meta")}, "a meta tensor"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "the unsupported dtype complex64 under 'w'"),
        ({"w": [1.0, 2.0]}, "holds an object of list, not a tensor, under 'w'"),
        ({3: torch.ones(2)}, "has the key 3"),
    ],
)
def test_a_mapping_of_something_else_than_dense_tensors_is_refused(tensors, message):
    line = _refused(tensors)
    assert line.startswith("'<mapping>' ")
    assert message in line


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors_are_refused(tmp_path):
    tensor = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    assert "a quantised tensor under 'w'" in _refused({"w": tensor})
    torch.save({"w": tensor}, tmp_path / "x.pt")
    assert "a quantised tensor under 'w'" in _refused(tmp_path / "x.pt")


def test_a_module_on_the_meta_device_is_refused():
    line = _refused(nn.Linear(2, 2, device="meta"), label="base")
    assert line.startswith("'base' holds a meta tensor")
