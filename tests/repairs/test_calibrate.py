"""Calibration: parity with the reference vectors, architectures, traps, and bad input."""

import pytest
import torch

from suture.repairs import repair
from tests.support import second_family as family


def clip_tower(state):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = family.INDEX["tower"]["config"]
    tower = CLIPVisionModel(CLIPVisionConfig(**config, attn_implementation="eager")).double().eval()
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in tower.state_dict()) else ""
    tower.load_state_dict({prefix + name: tensor for name, tensor in state.items()}, strict=False)
    return tower


def pooled(module, pixels):
    return module(pixel_values=pixels).pooler_output


def merges(base, models):
    """The merges that the towers were calibrated over."""
    from suture import merge

    double = {"average": merge(base, models, "simple_average")}
    double["task_arithmetic"] = merge(base, models, "task_arithmetic")
    double["ties"] = merge(base, models, "ties_merging")
    return double


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", family.names("tower", "featcal"))
def test_a_calibrated_tower_equals_the_reference(name, dtype):
    knobs = family.INDEX[name]["knobs"]
    base, models, _ = family.inputs(name)
    inputs = {model: family.tensors("tower")["inputs"][t].to(dtype) for t, model in enumerate(models)}
    merged = clip_tower(merges(base, models)[knobs["over"]]).to(dtype)
    experts = {model: clip_tower(state).to(dtype) for model, state in models.items()}
    result = repair(
        merged,
        experts,
        inputs,
        "calibrate",
        forward=pooled,
        base=clip_tower(base).to(dtype).state_dict(),
        encode_batch=5,
        anchor=knobs["rho"],
        ridge=knobs["ridge"],
        mix=knobs["mix"],
        other_tokens=knobs["other"],
    )
    for key, wanted in family.part(name, "merged").items():
        found = result.tensors[key].double()
        atol = 1e-10 if dtype == torch.float64 else 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=0, atol=atol)
