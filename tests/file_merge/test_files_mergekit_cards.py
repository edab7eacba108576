"""mergekit's YAML as public model cards have it: fifty configurations against mergekit 0.1.5 itself."""

import json
import math

import pytest
import tiny_llama
import torch
from golden_cases import FOLDER
from safetensors.torch import save_file

from suture import merge_mergekit
from suture.cli.main import main
from suture.errors import ConfigError

CARDS = json.loads((FOLDER / "mergekit_cards.json").read_text())
#: Cards whose method drops entries at random: another sample than mergekit's.
RANDOM = {"dare_ties 7b, the card of lazymergekit", "dare_linear", "della"}
#: Cards that are refused, and the name that the refusal has.
REFUSED = {"nuslerp by rows": "nuslerp_flatten", "arcee_fusion": "arcee_fusion"}
_HIDDEN, _INNER, _ROWS, _LAYERS = 16, 24, 32, 4
_CONFIG = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": _ROWS, "hidden_size": _HIDDEN},
    **{"intermediate_size": _INNER, "num_hidden_layers": _LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2},
}


def tensors(seed):
    """A model of fixed numbers, the base for seed 0; no two entries of a task vector have the same magnitude."""
    shapes = {"model.embed_tokens.weight": (_ROWS, _HIDDEN), "lm_head.weight": (_ROWS, _HIDDEN)}
    shapes["model.norm.weight"] = (_HIDDEN,)
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (_HIDDEN, _HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (_INNER, _HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (_HIDDEN, _INNER)}
        shapes |= {f"{prefix}{name}_layernorm.weight": (_HIDDEN,) for name in ("input", "post_attention")}
    found = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        k = torch.arange(math.prod(shape), dtype=torch.float64)
        delta = 0.1 * ((0.6180339887 * k * (seed + 1) + 0.754877666 * i) % 1 - 0.5) if seed else torch.zeros_like(k)
        found[name] = (0.5 * torch.sin(12.9898 * k + 78.233 * (i + 1)) + delta).float().view(shape)
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Placeholder → path."""
    folder = tmp_path_factory.mktemp("cards")
    for seed, name in enumerate(("base", "m0", "m1", "m2", "m3")):
        (folder / name).mkdir()
        save_file(tensors(seed), folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(_CONFIG))
    return {f"${name}": str(folder / name) for name in ("base", "m0", "m1", "m2", "m3")}


def written(text, models, folder):
    for name, path in models.items():
        text = text.replace(name, path)
    file = folder / "card.yml"
    file.write_text(text)
    return file


def projection(tensor):
    weights = torch.cos(0.7 * torch.arange(tensor.numel(), dtype=torch.float64))
    return float((tensor.double().flatten() * weights).sum())


@pytest.mark.parametrize("card", CARDS)
def test_a_card_gives_what_mergekit_gives_or_is_refused_by_name(card, models, tmp_path):
    config = written(CARDS[card]["config"], models, tmp_path)
    if card in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[card]):
            merge_mergekit(config, tmp_path / "out")
        return
    found = tiny_llama.tensors(merge_mergekit(config, tmp_path / "out"))
    wanted = CARDS[card]["projections"]
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        if card not in RANDOM:
            scale = max(1.0, float(tensor.norm()))
            assert abs(projection(tensor) - wanted[name]) < 3e-6 * scale, name


def test_fifty_cards_are_counted():
    assert len(CARDS) >= 50
    assert len(CARDS) - len(RANDOM) - len(REFUSED) >= 48


def test_parameters_that_mergekit_ignores_are_named(models, tmp_path, capsys):
    config = written(CARDS["slerp, embed_slerp of old cards"]["config"], models, tmp_path)
    assert main(["merge", f"mergekit={config}", f"output={tmp_path / 'out'}"]) == 0
    assert "embed_slerp: no parameter of slerp, ignored." in capsys.readouterr().out
    config.write_text(config.read_text().replace("embed_slerp", "embed_slurp"))
    with pytest.raises(ConfigError, match="embed_slurp"):
        merge_mergekit(config, tmp_path / "other")


def test_several_documents_are_several_merges_that_may_name_one_another(models, tmp_path):
    text = """
name: first
merge_method: linear
models:
  - {model: $m0, parameters: {weight: 0.5}}
  - {model: $m1, parameters: {weight: 0.5}}
---
name: second
merge_method: task_arithmetic
base_model: $base
models:
  - {model: first, parameters: {weight: 2.0}}
"""
    out = merge_mergekit(written(text, models, tmp_path), tmp_path / "out")
    found = tiny_llama.tensors(out / "second")
    base, one, two = (tensors(seed) for seed in (0, 1, 2))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, one[name] + two[name] - base[name])
    assert set(tiny_llama.tensors(out / "first")) == set(base)
    assert main(["merge", f"mergekit={tmp_path / 'card.yml'}", f"output={tmp_path / 'again'}"]) == 0
    bad = written(text.replace("name: first", "name: ../first"), models, tmp_path)
    with pytest.raises(ConfigError, match="is no name of a folder"):
        merge_mergekit(bad, tmp_path / "bad")
