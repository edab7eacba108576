"""The surgery module: its start, its variants, and units that never fire."""

import math

import pytest
import torch

from suture.repairs.modules import SurgeryModules, active_shares, auto_variants, dead_warnings

TASKS = ["cars", "digits", "birds"]


def filled(variant="standard", **options):
    modules = SurgeryModules(TASKS, 6, 4, variant=variant, dtype=torch.float64, **options)
    with torch.no_grad():
        modules.up.copy_(torch.randn(modules.up.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return modules


def test_the_start_is_the_identity_and_down_is_within_its_bound():
    modules, z = SurgeryModules(TASKS, 6, 50), torch.randn(6, 2, 6)
    assert torch.equal(modules(z, slice(0, 3)), z)
    assert modules.down.abs().max() <= 1 / math.sqrt(6)
    assert modules.down.abs().max() > 0.9 / math.sqrt(6)


def test_the_start_depends_on_seed_task_and_place_alone():
    one, turned = SurgeryModules(TASKS, 6, 4), SurgeryModules(TASKS[::-1], 6, 4)
    assert torch.equal(one.down, turned.down.flip(0))
    assert not torch.equal(one.down, SurgeryModules(TASKS, 6, 4, seed=1).down)
    assert not torch.equal(one.down, SurgeryModules(TASKS, 6, 4, layer="layers.0").down)
    assert not torch.equal(one.down[0], one.down[1])


def test_a_case_worked_by_hand():
    modules = SurgeryModules(["t"], 2, 1)
    with torch.no_grad():
        modules.down.copy_(torch.tensor([[[1.0, 1.0]]]))
        modules.up.copy_(torch.tensor([[[2.0], [0.5]]]))
    z = torch.tensor([[[1.0, 2.0]], [[-1.0, -2.0]]])
    assert torch.equal(modules(z, slice(0, 1)), torch.tensor([[[-5.0, 0.5]], [[-1.0, -2.0]]]))


def test_rows_in_groups_and_rows_by_index_go_through_the_same_modules():
    modules, z = filled(), torch.randn(6, 2, 6, dtype=torch.float64)
    by_index = modules(z, torch.tensor([0, 0, 1, 1, 2, 2]))
    torch.testing.assert_close(modules(z, slice(0, 3)), by_index, rtol=0, atol=1e-14)
    torch.testing.assert_close(modules.only(1)(z[2:4], slice(0, 1)), by_index[2:4], rtol=0, atol=1e-14)


def test_the_normalised_variant_normalises_before_and_not_after():
    modules, z = filled("normalised"), torch.randn(3, 1, 6, dtype=torch.float64)
    torch.testing.assert_close(modules(z, slice(0, 3)), modules(5 * z, slice(0, 3)), rtol=0, atol=1e-14)
    assert (modules(z, slice(0, 3)).norm(dim=-1) - 1).abs().max() > 0.01


@pytest.mark.parametrize("variant", ["standard", "centred"])
def test_only_the_centred_variant_cannot_die_on_features_far_from_zero(variant):
    modules, z = filled(variant), torch.rand(3, 20, 6, dtype=torch.float64) + 10
    if modules.mean is not None:
        modules.mean.copy_(z.mean(1, keepdim=True))
    with torch.no_grad():
        modules.down.copy_(-modules.down.abs())  # every unit looks away from non-negative features
    modules.clear()
    corrected = modules(z, slice(0, 3))
    dead = variant == "standard"
    assert torch.equal(corrected, z) == dead
    assert active_shares({"p": modules}, TASKS) == dict.fromkeys(TASKS, 0.0 if dead else 1.0)
    warnings = dead_warnings({"p": modules}, TASKS)
    assert len(warnings) == (3 if dead else 0)
    assert not dead or "Task 'cars': only 0% of the repair's units" in warnings[0]


def test_the_variant_depends_on_the_share_of_features_that_are_negative():
    signed, few = torch.randn(50, 6), torch.rand(50, 6)
    few[0, 0] = -1  # 1 of 300
    assert auto_variants({"a": [signed], "b": [signed, few]}) == ({"a": "standard", "b": "standard"}, ())
    variants, notes = auto_variants({"a": [signed], "b": [few, torch.rand(5, 6)]})
    assert variants == {"a": "standard", "b": "centred"}
    assert notes == ("variant=centred at b, because 99.7% of the features are ≥ 0.",)
    assert auto_variants({"a": [few]})[1] == ("variant=centred, because 99.67% of the features are ≥ 0.",)


def test_a_lower_precision_goes_in_and_out():
    assert SurgeryModules(TASKS, 6, 4)(torch.randn(3, 1, 6).bfloat16(), slice(0, 3)).dtype == torch.bfloat16
