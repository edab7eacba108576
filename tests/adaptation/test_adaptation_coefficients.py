"""Coefficients of merging: which tensors share one, and the files that keep them."""

import numpy as np
import pytest
import torch

from suture.adaptation import Coefficients, layout, load_coefficients, save_coefficients
from suture.adaptation.coefficients import initial_values
from suture.errors import ConfigError

TENSORS = ("stem.weight", "layers.0.a.weight", "layers.0.b.weight", "layers.1.a.weight", "head.weight")
TASKS = ("cars", "digits")


def coefficients(granularity):
    wanted = layout(granularity, TASKS, TENSORS)
    values = torch.linspace(-0.1, 0.9, int(np.prod(wanted.shape)), dtype=torch.float64).reshape(wanted.shape)
    return wanted, Coefficients(values, wanted.tasks, wanted.columns)


@pytest.mark.parametrize(
    ("granularity", "columns", "index"),
    [
        ("task", None, (0, 0, 0, 0, 0)),
        ("layer", TENSORS, (0, 1, 2, 3, 4)),
        ("block", ("rest", "layers.0", "layers.1"), (0, 1, 1, 2, 0)),
        ([r"\.[ab]\."], ("rest", ".a.", ".b."), (0, 1, 2, 1, 0)),
        ({"body": r"^layers", "ends": "stem|head"}, ("ends", "body"), (0, 1, 1, 1, 0)),
    ],
)
def test_tensors_share_the_column_of_their_group(granularity, columns, index):
    found = layout(granularity, TASKS, TENSORS)
    assert (found.columns, found.index) == (columns, index)


def test_a_group_s_coefficient_reaches_all_its_tensors():
    wanted, kept = coefficients("block")
    assert torch.equal(wanted.spread(kept.values), kept.values[:, [0, 1, 1, 2, 0]])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npy"])
@pytest.mark.parametrize("granularity", ["task", "layer", "block"])
def test_a_file_gives_back_the_same_bits(tmp_path, granularity, suffix):
    wanted, kept = coefficients(granularity)
    save_coefficients(kept, tmp_path / f"kept{suffix}")
    assert torch.equal(load_coefficients(tmp_path / f"kept{suffix}", wanted), kept.values)
    assert [file.name for file in tmp_path.iterdir()] == [f"kept{suffix}"]


@pytest.mark.parametrize("source", ["list", "tensor", "array", "bare.pt", "old.np"])
def test_bare_numbers_of_the_right_shape_are_taken(tmp_path, source):
    wanted, kept = coefficients("layer")
    sources = {"list": kept.values.tolist(), "tensor": kept.values.float(), "array": kept.values.numpy()}
    if source == "bare.pt":
        torch.save(kept.values, tmp_path / source)
    if source == "old.np":
        with (tmp_path / source).open("wb") as file:
            np.save(file, kept.values.numpy())
    torch.testing.assert_close(load_coefficients(sources.get(source, tmp_path / source), wanted), kept.values)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_names_and_not_positions_count_where_a_file_has_them(tmp_path, suffix):
    _, kept = coefficients("layer")
    save_coefficients(kept, tmp_path / f"kept{suffix}")
    turned = layout("layer", TASKS[::-1], TENSORS[::-1])
    assert torch.equal(load_coefficients(tmp_path / f"kept{suffix}", turned), kept.values.flip(0, 1))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npy"])
@pytest.mark.parametrize(
    "wanted",
    [
        layout("task", TASKS, TENSORS),
        layout("block", TASKS, TENSORS),
        layout("layer", [*TASKS, "birds"], TENSORS),
        layout("layer", TASKS, TENSORS[:-1]),
    ],
    ids=["task-wise", "block", "more tasks", "fewer layers"],
)
def test_a_file_of_another_shape_is_refused(tmp_path, suffix, wanted):
    file = tmp_path / f"kept{suffix}"
    save_coefficients(coefficients("layer")[1], file)
    with pytest.raises(ConfigError, match=rf"kept{suffix}.*shape \(2, 5\)") as refused:
        load_coefficients(file, wanted)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("tasks", "tensors", "name"),
    [(("cars", "birds"), TENSORS, "birds"), (TASKS, ("other", *TENSORS[1:]), "other")],
)
def test_a_file_for_other_tasks_or_layers_is_refused(tmp_path, suffix, tasks, tensors, name):
    file = tmp_path / f"kept{suffix}"
    save_coefficients(coefficients("layer")[1], file)
    with pytest.raises(ConfigError, match=f"'{name}' is wanted"):
        load_coefficients(file, layout("layer", tasks, tensors))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pt", None, "no such file"),
        ("broken.pt", b"nothing", "no coefficients can be read"),
        ("broken.npy", b"nothing", "no coefficients can be read"),
        ("broken.safetensors", b"nothing", "no coefficients can be read"),
        ("kept.csv", b"1,2", "not in '.csv'"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refused:
        load_coefficients(tmp_path / name, coefficients("task")[0])
    assert "\n" not in str(refused.value)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("boom").touch, ())

    torch.save(Bomb(), tmp_path / "bomb.pt")
    np.save(tmp_path / "bomb.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    for file in ("bomb.pt", "bomb.npy"):
        with pytest.raises(ConfigError):
            load_coefficients(tmp_path / file, coefficients("task")[0])
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("bad", [[0.1, float("nan")], ["a", "b"], [[0.1], [0.2, 0.3]], [float("inf"), 0.0]])
def test_values_that_are_no_numbers_are_refused(bad):
    with pytest.raises(ConfigError):
        load_coefficients(bad, coefficients("task")[0])


def test_task_wise_coefficients_may_start_layer_wise_ones():
    _, kept = coefficients("task")
    wanted, _ = coefficients("layer")
    assert torch.equal(initial_values(kept, wanted), kept.values[:, None].expand(2, 5))


def test_no_coefficients_are_saved_under_an_unknown_suffix(tmp_path):
    with pytest.raises(ConfigError, match=r"not in '.txt'"):
        save_coefficients(coefficients("task")[1], tmp_path / "kept.txt")
