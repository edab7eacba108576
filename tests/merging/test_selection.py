"""frozen, keep and only: one meaning in every door."""

import pytest
import tiny_llama
import torch

import suture
from suture import merge_files
from suture.errors import ConfigError, IncompatibleModels

BASE = {"body.a": torch.zeros(2), "body.b": torch.zeros(2), "head.w": torch.zeros(3)}
TUNED = {"body.a": torch.ones(2), "body.b": torch.ones(2)}
OTHER = TUNED | {"head.w": torch.ones(5), "ema.x": torch.ones(1)}


def in_memory(base, models, tmp_path, **choice):
    return suture.merge(base, models, "simple_average", **choice)


def in_files(base, models, tmp_path, **choice):
    return tiny_llama.tensors(merge_files(base, models, "simple_average", tmp_path / "out", **choice))


DOORS = pytest.mark.parametrize("door", [in_memory, in_files])


@DOORS
@pytest.mark.parametrize(
    ("models", "choice", "merged"),
    [
        ([TUNED | {"head.w": torch.ones(3)}], {"frozen": ["head.*"]}, {"body.a", "body.b"}),
        ([TUNED | {"head.w": torch.ones(3)}], {"keep": ["head.*"]}, {"body.a", "body.b"}),
        ([TUNED], {"keep": ["head.*"]}, {"body.a", "body.b"}),
        ([TUNED, OTHER], {"keep": ["head.w", "ema.*"]}, {"body.a", "body.b"}),
        ([OTHER], {"only": ["body.a"]}, {"body.a"}),
        ([OTHER], {"only": ["body.*"], "frozen": ["*.b"]}, {"body.a"}),
    ],
)
def test_the_chosen_tensors_are_merged_and_the_others_stay_at_the_base(door, models, choice, merged, tmp_path):
    found = door(BASE, {str(i): model for i, model in enumerate(models)}, tmp_path, **choice)
    assert set(found) == set(BASE)
    assert {name for name in found if not torch.equal(found[name], BASE[name])} == merged


@DOORS
def test_what_is_not_asked_for_is_still_refused(door, tmp_path):
    with pytest.raises(IncompatibleModels, match=r"'head.w' is missing"):
        door(BASE, {"m": TUNED}, tmp_path)
    with pytest.raises(IncompatibleModels, match=r"'head.w' is missing"):
        door(BASE, {"m": TUNED}, tmp_path, keep=["body.a"])
    with pytest.raises(ConfigError, match=r"keep: 'hed\.\*' is the name of no tensor"):
        door(BASE, {"m": TUNED}, tmp_path, keep=["hed.*"])


@DOORS
def test_a_table_of_another_size_stays_with_its_tie(door, tmp_path):
    table = torch.zeros(4, 2)
    base = {"embed.weight": table, "lm_head.weight": table, "w": torch.zeros(2)}
    wide = torch.ones(6, 2)
    model = {"embed.weight": wide, "lm_head.weight": wide, "w": torch.ones(2)}
    found = door(base, {"m": model}, tmp_path, keep=["embed*", "lm_head*"])
    assert torch.equal(found["embed.weight"], table)
    assert torch.equal(found["w"], torch.ones(2))
