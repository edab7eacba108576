"""Every kind of source gives one and the same mapping."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_files import assert_same, refused, small_model
from torch import nn

from suture.checkpoints import Checkpoint, TensorSpec, open_checkpoint, save_checkpoint
from suture.errors import CheckpointError


def _safetensors_file(folder: Path, state) -> Path:
    safetensors.torch.save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def _torch_file(folder: Path, state) -> Path:
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt"


def _legacy_torch_file(folder: Path, state) -> Path:
    torch.save(state, folder / "weights.bin", _use_new_zipfile_serialization=False)
    return folder / "weights.bin"


def _lightning_file(folder: Path, state) -> Path:
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, folder / "last.ckpt")
    return folder / "last.ckpt"


def _model_directory(folder: Path, state) -> Path:
    (folder / "config.json").write_text("{}")
    safetensors.torch.save_file(state, folder / "model.safetensors")
    return folder


def _pytorch_directory(folder: Path, state) -> Path:
    (folder / "config.json").write_text("{}")
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def _shards(folder: Path, state, stem: str, save) -> Path:
    weight_map = {}
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = stem.format(f"-0000{number}-of-00002")
        save({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / (stem.format("") + ".index.json")).write_text(json.dumps(index))
    return folder


def _sharded_safetensors(folder: Path, state) -> Path:
    return _shards(folder, state, "model{}.safetensors", safetensors.torch.save_file)


def _sharded_torch(folder: Path, state) -> Path:
    return _shards(folder, state, "pytorch_model{}.bin", torch.save)


_MAKERS = [
    _safetensors_file,
    _torch_file,
    _legacy_torch_file,
    _lightning_file,
    _model_directory,
    _pytorch_directory,
    _sharded_safetensors,
    _sharded_torch,
]


@pytest.mark.parametrize("make", _MAKERS, ids=lambda make: make.__name__.strip("_"))
def test_every_kind_of_file_gives_the_same_mapping(make, tmp_path):
    state = small_model().state_dict()
    with open_checkpoint(make(tmp_path, state)) as checkpoint:
        assert_same(checkpoint, state)
        assert checkpoint.specs["0.weight"] == TensorSpec((4, 3), torch.float32)
        assert checkpoint.files
        assert all(path.is_file() for path in checkpoint.files)


def test_a_module_a_mapping_and_an_open_checkpoint_give_the_same_mapping():
    model = small_model()
    opened = open_checkpoint(model)
    assert_same(opened, model.state_dict())
    assert_same(open_checkpoint(model.state_dict()), model.state_dict())
    assert open_checkpoint(opened) is opened
    assert opened.files == ()
    assert opened.directory is None


def test_the_caller_s_tensors_are_detached_and_not_copied():
    model = small_model()
    tensor = open_checkpoint(model)["0.weight"]
    assert not tensor.requires_grad
    assert tensor.data_ptr() == model[0].weight.data_ptr()


def test_the_model_directory_is_known_from_its_file_too(tmp_path):
    folder = _model_directory(tmp_path, small_model().state_dict())
    assert open_checkpoint(folder).directory == tmp_path
    assert open_checkpoint(folder / "model.safetensors").directory == tmp_path


def test_an_index_of_shards_can_be_opened_itself(tmp_path):
    state = small_model().state_dict()
    folder = _sharded_safetensors(tmp_path, state)
    assert_same(open_checkpoint(folder / "model.safetensors.index.json"), state)


def test_the_content_decides_and_not_the_suffix(tmp_path):
    state = small_model().state_dict()
    safetensors.torch.save_file(state, tmp_path / "weights.bin")
    torch.save(state, tmp_path / "weights.safetensors")
    assert_same(open_checkpoint(tmp_path / "weights.bin"), state)
    assert_same(open_checkpoint(tmp_path / "weights.safetensors"), state)


@pytest.mark.parametrize("make", [_safetensors_file, _torch_file, _legacy_torch_file])
def test_writing_to_a_tensor_never_reaches_the_file(make, tmp_path):
    path = make(tmp_path, small_model().state_dict())
    before = path.read_bytes()
    for tensor in open_checkpoint(path).values():
        tensor.zero_()
    assert path.read_bytes() == before


def test_tensors_of_a_file_have_storages_of_their_own(tmp_path):
    path = _safetensors_file(tmp_path, small_model().state_dict())
    for tensor in open_checkpoint(path).values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_pickle_protocol_is_read(protocol, zipped, tmp_path):
    state = small_model().state_dict()
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save({"model": nn.ParameterDict({"w": nn.Parameter(torch.ones(2))})}, tmp_path / "module.pt", **options)
    torch.save(state, tmp_path / "state.pt", **options)
    assert_same(open_checkpoint(tmp_path / "state.pt"), state)
    assert_same(open_checkpoint(tmp_path / "module.pt"), {"w": torch.ones(2)})


_DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "int32", "int16", "int8"]


@pytest.mark.parametrize("dtype", [*_DTYPES, "uint8", "uint16", "uint32", "uint64", "bool"])
def test_every_dtype_is_kept(dtype, tmp_path):
    state = {"x": torch.tensor([0, 1, 1]).to(getattr(torch, dtype))}
    for make in (_safetensors_file, _torch_file):
        found = open_checkpoint(make(tmp_path, state))["x"]
        assert found.dtype == state["x"].dtype
        assert found.float().tolist() == [0, 1, 1]


def test_zero_dim_and_empty_tensors_keep_their_shape(tmp_path):
    state = {"scale": torch.tensor(2.5), "none": torch.zeros(0, 3), "count": torch.tensor(7)}
    for make in (_safetensors_file, _torch_file, _legacy_torch_file):
        checkpoint = open_checkpoint(make(tmp_path, state))
        assert_same(checkpoint, state)
        assert checkpoint.specs["scale"].shape == ()
        assert checkpoint.specs["scale"].numel == 1


def test_integer_buffers_and_batch_norm_statistics_keep_their_dtype():
    checkpoint = open_checkpoint(small_model())
    assert checkpoint["1.num_batches_tracked"].dtype == torch.int64
    assert checkpoint["1.num_batches_tracked"].shape == ()
    assert checkpoint["1.running_var"].dtype == torch.float32


def test_transposed_and_offset_tensors_of_a_torch_file_are_read(tmp_path):
    storage = torch.arange(24.0)
    state = {"t": storage[:12].view(3, 4).t(), "tail": storage[20:], "every_other": storage[1::2]}
    for make in (_torch_file, _legacy_torch_file):
        checkpoint = open_checkpoint(make(tmp_path, state))
        assert_same(checkpoint, state)
        assert checkpoint["t"].stride() == (1, 4)


def test_tied_tensors_are_one_tensor_with_aliases(tmp_path):
    shared = torch.randn(4, 4)
    state = {"head.weight": shared, "embed.weight": shared, "free": shared.clone()}
    torch.save(state, tmp_path / "tied.pt")
    model = nn.ModuleDict({"head": nn.Linear(4, 4, bias=False), "embed": nn.Linear(4, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    for source in (state, tmp_path / "tied.pt", model):
        checkpoint = open_checkpoint(source)
        assert checkpoint.aliases == {"head.weight": "embed.weight"}
        assert torch.equal(checkpoint["head.weight"], checkpoint["embed.weight"])


def test_views_that_overlap_in_part_are_separate_tensors(tmp_path):
    storage = torch.arange(10.0)
    state = {"a": storage[:6], "b": storage[4:], "c": storage[:6].view(2, 3)}
    torch.save(state, tmp_path / "views.pt")
    for source in (state, tmp_path / "views.pt"):
        checkpoint = open_checkpoint(source)
        assert checkpoint.aliases == {}
        assert_same(checkpoint, state)


def test_names_that_safetensors_dropped_as_tied_come_back(tmp_path):
    model = nn.ModuleDict({"b": nn.Linear(3, 3), "a": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert_same(checkpoint, model.state_dict())
    assert checkpoint.aliases == {"b.weight": "a.weight"}


def test_specs_come_from_the_header_alone(tmp_path):
    names = [f"layer.{number}.weight" for number in range(300)]
    specs = {"dtype": "F32", "shape": [2900, 2900]}
    size = 4 * 2900**2
    header = {n: {**specs, "data_offsets": [i * size, (i + 1) * size]} for i, n in enumerate(names)}
    text = json.dumps(header).encode()
    with (tmp_path / "huge.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + len(names) * size)  # ten gigabytes, none of them on the disk
    checkpoint = open_checkpoint(tmp_path / "huge.safetensors")
    assert checkpoint.specs[names[-1]].nbytes == size
    assert checkpoint[names[-1]][0, :3].tolist() == [0, 0, 0]


def test_a_tensor_at_an_odd_offset_is_copied(tmp_path):
    safetensors_header = {
        "flag": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    text = json.dumps(safetensors_header).encode()
    data = b"\x01" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert open_checkpoint(path)["x"].tolist() == [1.5, -2.0]


def test_a_closed_checkpoint_keeps_its_specs_and_refuses_to_read(tmp_path):
    with open_checkpoint(_safetensors_file(tmp_path, {"w": torch.ones(2)})) as checkpoint:
        kept = checkpoint["w"]
    assert kept.tolist() == [1, 1]
    assert list(checkpoint.specs) == ["w"]
    assert "is closed" in refused(checkpoint.__getitem__, "w", kind=CheckpointError)


def test_some_tensors_can_be_selected_under_other_names(tmp_path):
    path = _safetensors_file(tmp_path, {"vision.w": torch.ones(2), "text.w": torch.zeros(2)})
    selected = open_checkpoint(path).select({"w": "vision.w"})
    assert_same(selected, {"w": torch.ones(2)})
    assert selected.files == (path,)


def test_an_unknown_name_is_a_key_error():
    checkpoint = open_checkpoint({"w": torch.ones(2)})
    assert "v" not in checkpoint
    with pytest.raises(KeyError):
        checkpoint["v"]


@pytest.mark.parametrize("metadata", [None, {"task": "mnist"}])
def test_metadata_comes_back(metadata, tmp_path):
    save_checkpoint({"mnist": torch.ones(1)}, tmp_path / "x.safetensors", metadata)
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.metadata == {"format": "pt", **(metadata or {})}
    assert checkpoint.aliases == {}


def test_a_label_is_what_messages_call_it(tmp_path):
    assert open_checkpoint({"w": torch.ones(1)}, label="mnist").label == "mnist"
    assert refused(open_checkpoint, tmp_path / "no.pt", label="mnist", kind=CheckpointError).startswith("'mnist': ")
    assert isinstance(open_checkpoint({}), Checkpoint)


_READ_ALL = """
import sys, torch
from suture.checkpoints import open_checkpoint

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

torch.ones(1000, 1000).sum()
before = anonymous()
checkpoint = open_checkpoint(sys.argv[1])
kept = {name: checkpoint[name] for name in checkpoint}
total = sum(float(tensor.sum()) for tensor in kept.values())
print(total, anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("make", [_safetensors_file, _torch_file])
def test_reading_every_tensor_takes_no_anonymous_memory(make, tmp_path):
    path = make(tmp_path, {f"w{number}": torch.ones(5, 1_000_000) for number in range(10)})
    result = subprocess.run([sys.executable, "-c", _READ_ALL, path], capture_output=True, text=True, check=True)
    total, megabytes = map(float, result.stdout.split())
    assert total == 5e7
    assert megabytes < 20
