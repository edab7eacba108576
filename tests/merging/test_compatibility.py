"""What does not fit is named: tensor, model, found, wanted, remedy."""

import pytest
import torch

from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.errors import CheckpointError, ConfigError, IncompatibleModels
from suture.merging.compatibility import compatibility
from suture.merging.merge import merge
from suture.merging.registry import get_method
from suture.pipeline.preflight import non_finite_samples, preflight


def problems(base, model, **options):
    return compatibility(open_checkpoint(base), {"mnist": open_checkpoint(model)}, **options)


def test_models_that_fit_have_no_problems():
    assert problems({"w": torch.zeros(2)}, {"w": torch.ones(2)}) == []


def test_paths_and_lists_are_compared_as_merge_would(tmp_path):
    for name, size in {"base": 2, "one": 2, "two": 3}.items():
        save_checkpoint({"w": torch.zeros(size)}, tmp_path / f"{name}.safetensors")
    path = lambda name: str(tmp_path / f"{name}.safetensors")
    (line,) = compatibility(path("base"), [path("one"), path("two")])
    assert "'w' has shape (3,) in 'model_2' but (2,) in the base" in line
    assert compatibility({"w": torch.zeros(2)}, {"one": path("one")}) == []
    with pytest.raises(CheckpointError, match="does not exist"):
        compatibility("base.pt", {"one": path("one")})
    with pytest.raises(ConfigError, match=r"models is the one path '.*'\. Remedy: give a list"):
        merge(path("base"), path("one"))


@pytest.mark.parametrize(
    ("base", "model", "says"),
    [
        ({"w": torch.zeros(2)}, {}, "'w' is missing in 'mnist' (the base has float32 (2,))"),
        ({}, {"w": torch.zeros(2)}, "'w' (float32 (2,)) is in 'mnist' but not in the base"),
        ({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, "'w' has shape (3,) in 'mnist' but (2,) in the base"),
        ({"w": torch.zeros(2)}, {"w": torch.zeros(2).half()}, "'w' is float16 in 'mnist' but float32 in the base"),
        (
            {"embed_tokens.weight": torch.zeros(10, 2)},
            {"embed_tokens.weight": torch.zeros(11, 2)},
            "has 11 rows in 'mnist' but 10 in the base: the vocabularies differ",
        ),
    ],
)
def test_a_difference_is_one_line_with_a_remedy(base, model, says):
    (line,) = problems(base, model)
    assert says in line
    assert "Remedy:" in line
    assert "\n" not in line


def test_all_problems_come_at_once_and_long_lists_are_counted():
    base = {f"layer.{i:02}": torch.zeros(1) for i in range(20)} | {"w": torch.zeros(2)}
    lines = problems(base, {"w": torch.zeros(3), "more": torch.zeros(1)})
    assert len(lines) == 5 + 1 + 1 + 1
    assert "… and 15 more" in lines[5]


def test_mixed_dtypes_are_allowed_by_name():
    base, model = {"w": torch.zeros(2)}, {"w": torch.ones(2).half()}
    assert problems(base, model, mixed_dtypes=True) == []
    assert merge(base, [model], "simple_average", mixed_dtypes=True)["w"].dtype == torch.float32


def test_frozen_tensors_may_differ_and_must_exist():
    base, model = {"w": torch.zeros(2), "v": torch.zeros(2)}, {"w": torch.zeros(9), "v": torch.zeros(2)}
    assert problems(base, model, frozen=("w",)) == []
    assert "no such tensor" in problems(base, model, frozen=("w", "x"))[0]


def test_a_tensor_tied_only_in_the_base_is_a_problem():
    weight = torch.zeros(3, 2)
    lines = problems({"a": weight, "b": weight}, {"a": torch.zeros(3, 2), "b": torch.ones(3, 2)})
    assert "'b' is tied to 'a' in the base but not in 'mnist'" in lines[0]


def test_a_model_may_leave_out_the_alias_of_a_tied_tensor():
    weight = torch.zeros(3, 2)
    assert problems({"a": weight, "b": weight}, {"a": torch.zeros(3, 2)}) == []


def test_merging_refuses_with_the_first_problem_and_the_number_of_others():
    with pytest.raises(IncompatibleModels, match=r"'a' is missing in 'model_1'.*\(and 1 more"):
        merge({"a": torch.zeros(1), "b": torch.zeros(1)}, [{"c": torch.zeros(1), "b": torch.zeros(1)}])


def test_no_models_is_a_problem():
    assert "no model to merge" in compatibility(open_checkpoint({}), {})[0]


@pytest.mark.parametrize("where", [0, 50_000, 99_999])
def test_samples_find_bad_weights_at_the_ends_and_in_the_middle(where):
    weight = torch.zeros(100_000)
    weight[where] = float("nan")
    (line,) = non_finite_samples([("mnist", open_checkpoint({"w": weight}))], ["w"])
    assert "'w' holds NaN or Inf in 'mnist'" in line


def test_batch_norm_says_how_the_experts_were_trained():
    base, frozen, moved = (open_checkpoint(torch.nn.BatchNorm1d(3)) for _ in range(3))
    moved["running_mean"].add_(1)
    (note,) = preflight(base, {"frozen": frozen, "moved": moved}).notes
    assert "differ from the base's in moved" in note
    assert "equal the base's in frozen" in note


def test_sizes_are_predicted(tmp_path):
    base, model = ({"w": torch.zeros(1000)} for _ in range(2))
    found = preflight(
        open_checkpoint(base), {"one": open_checkpoint(model)}, get_method("ties_merging"), output=tmp_path
    )
    assert (found.tensors, found.parameters, found.bytes_read, found.bytes_written) == (1, 1000, 16_000, 4_000)
    assert found.disk_free > 0
