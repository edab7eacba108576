"""mergekit's YAML: the same results as its own formulas, slices, and what is refused."""

import json
import shutil

import golden_cases as golden
import pytest
import tiny_llama
import torch
import yaml

import suture
from suture import merge_mergekit
from suture.checkpoints import open_checkpoint
from suture.cli.main import main
from suture.errors import ConfigError
from suture.file_merge.mergekit import translation as mergekit
from suture.merging.counter_random import SlicePosition


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamas")
    base = tiny_llama.save_base(folder / "base")
    for seed, name in enumerate(("math", "code"), start=1):
        tiny_llama.save_tuned(folder / name, base, seed)
    return folder


def merged(llamas, tmp_path, text, **options):
    """The tensors that a configuration gives; {x} stands for the path of model x."""
    config = tmp_path / "config.yml"
    config.write_text(text.format(base=llamas / "base", math=llamas / "math", code=llamas / "code"))
    return tiny_llama.tensors(merge_mergekit(config, tmp_path / "out", **options))


def wide(llamas, *names):
    return [{k: t.float() for k, t in open_checkpoint(llamas / name).items()} for name in names]


def test_linear_is_the_weighted_mean(llamas, tmp_path):
    text = """
merge_method: linear
models:
  - model: {math}
    parameters: {{weight: 1.0}}
  - model: {code}
    parameters: {{weight: 3.0}}
dtype: float32
"""
    found = merged(llamas, tmp_path, text)
    math, code = wide(llamas, "math", "code")
    for name in found:
        torch.testing.assert_close(found[name], (math[name] + 3 * code[name]) / 4)


def test_ties_has_a_density_and_a_weight_for_each_model(llamas, tmp_path):
    text = """
merge_method: ties
base_model: {base}
models:
  - model: {math}
    parameters: {{weight: 0.5, density: 0.3}}
  - model: {code}
    parameters: {{weight: 1.0, density: 0.6}}
parameters: {{normalize: true, lambda: 0.8}}
dtype: float32
"""
    found = merged(llamas, tmp_path, text)
    base, math, code = wide(llamas, "base", "math", "code")
    for name in found:
        deltas = [
            weight * top(model[name] - base[name], density)
            for model, weight, density in ((math, 0.5, 0.3), (code, 1.0, 0.6))
        ]
        side = torch.where(sum(deltas) >= 0, 1.0, -1.0)
        agree = [delta.sign() == side for delta in deltas]
        total = sum(delta * a for delta, a in zip(deltas, agree, strict=True))
        mass = 0.5 * agree[0] + 1.0 * agree[1]
        expected = base[name] + 0.8 * total / torch.where(mass == 0, 1.0, mass)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)


def top(delta, density):
    """The largest entries; ones of equal magnitude go together."""
    kept = max(1, int(density * delta.numel()))
    return delta * (delta.abs() >= delta.abs().flatten().sort(descending=True).values[kept - 1])


def test_filters_and_gradients_give_each_tensor_its_own_parameter(llamas, tmp_path):
    text = """
merge_method: slerp
base_model: {base}
slices:
  - sources:
      - {{model: {base}, layer_range: [0, 3]}}
      - {{model: {math}, layer_range: [0, 3]}}
parameters:
  t:
    - filter: self_attn
      value: [0.0, 0.5, 1.0]
    - filter: mlp
      value: 0.25
    - value: 0.5
dtype: bfloat16
"""
    found = merged(llamas, tmp_path, text)
    for t, part in (
        (0.0, "layers.0.self_attn"),
        (0.5, "layers.1.self_attn"),
        (1.0, "layers.2.self_attn"),
        (0.25, "layers.1.mlp"),
        (0.5, "embed_tokens"),
        (0.5, "lm_head"),
    ):
        expected = suture.merge(llamas / "base", [llamas / "math"], "slerp", t=t)
        names = [name for name in found if part in name]
        assert names
        assert all(torch.equal(found[name], expected[name]) for name in names), part


def test_passthrough_stacks_slices_of_layers_into_a_model_that_loads(llamas, tmp_path):
    from transformers import AutoModelForCausalLM

    text = """
merge_method: passthrough
slices:
  - sources: [{{model: {math}, layer_range: [0, 2]}}]
  - sources:
      - model: {code}
        layer_range: [1, 3]
        parameters:
          scale: [{{filter: o_proj, value: 0.0}}, {{value: 1.0}}]
dtype: bfloat16
"""
    found = merged(llamas, tmp_path, text)
    math, code = tiny_llama.tensors(llamas / "math"), tiny_llama.tensors(llamas / "code")
    for out, model, layer in ((0, math, 0), (1, math, 1), (2, code, 1), (3, code, 2)):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(found[name.format(out)], model[name.format(layer)])
    assert torch.equal(found["model.embed_tokens.weight"], math["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], code["lm_head.weight"])
    assert not found["model.layers.3.self_attn.o_proj.weight"].any()
    assert found["model.layers.0.self_attn.o_proj.weight"].any()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 4
    assert torch.equal(
        model.state_dict()["model.layers.3.mlp.up_proj.weight"], code["model.layers.2.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize("method", sorted(set(mergekit.METHODS) - {"linear", "slerp", "passthrough"}))
def test_every_method_runs_and_stays_near_its_models(llamas, tmp_path, method):
    known = mergekit.METHODS[method].parameters
    own = {"weight": 0.5} if "weight" in known else {}
    own |= {"density": 0.6} if "density" in known and method != "task_arithmetic" else {}
    text = {"merge_method": method, "base_model": str(llamas / "base"), "dtype": "float32"}
    text |= {"parameters": {"t": 0.01}} if method == "nearswap" else {}
    models = [str(llamas / name) for name in ("math", "code", *(["base"] if method == "karcher" else []))]
    models = models[:1] if method == "nearswap" else models
    text["models"] = [{"model": model, "parameters": own} if own else {"model": model} for model in models]
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(text))
    found = tiny_llama.tensors(merge_mergekit(config, tmp_path / "out"))
    (base,) = wide(llamas, "base")
    assert all(0 < (found[name] - base[name]).abs().mean() < 0.1 for name in base)


@pytest.mark.parametrize("name", golden.names("tensor_"))
def test_the_reference_vectors_come_out_of_its_own_configuration(tmp_path, name):
    case, base, models, tensors = golden.load(name)
    for label, state in {"base": base, **models}.items():
        suture.save_checkpoint(state, tmp_path / f"{label}.safetensors")
    parameters = dict(case["parameters"])
    own = {key: parameters.pop(key) for key in ("weight", "density", "gamma") if key in parameters}
    parts = [
        {"model": str(tmp_path / f"{label}.safetensors"), **({"parameters": own} if own else {})} for label in models
    ]
    told = {"merge_method": case["method"], "models": parts, **({"parameters": parameters} if parameters else {})}
    told |= {} if case["method"] == "linear" else {"base_model": str(tmp_path / "base.safetensors")}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(told))
    found = tiny_llama.tensors(merge_mergekit(tmp_path / "config.yml", tmp_path / "out"))
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, tensors[f"merged/{key}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", golden.names("mergekit_"))
def test_every_method_computes_what_mergekit_does_with_the_same_random_numbers(tmp_path, name):
    case, base, models, tensors = golden.load(name)
    for label, state in {"base": base, **models}.items():
        suture.save_checkpoint(state, tmp_path / f"{label}.safetensors")
    own = lambda i: {"parameters": {key: values[i] for key, values in case["per_model"].items()}}
    parts = [
        {"model": f"{tmp_path}/{m}.safetensors"} | (own(i) if case["per_model"] else {}) for i, m in enumerate(models)
    ]
    told = {"merge_method": case["method"], "models": parts, "parameters": case["shared"]}
    told |= {"base_model": f"{tmp_path}/base.safetensors"} if case["base"] else {}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(told))
    translation = mergekit.translate(tmp_path / "config.yml")
    method, knobs = suture.get_method(translation.method), translation.tensor_knobs(list(base))
    for key, tensor in base.items():
        rows = torch.stack([model[key] - (tensor if method.operand == "deltas" else 0) for model in models.values()])
        position = {"position": SlicePosition(key, list(models))} if method.takes_position else {}
        seed = {"seed": case["seed"]} if "seed" in case else {}
        merged = method.function(tensor, rows, **position, **{**knobs.knobs_of(key), **seed})
        torch.testing.assert_close(merged, tensors[f"merged/{key}"], rtol=0, atol=1e-6)


def test_modules_have_parameters_and_models_of_their_own(llamas, tmp_path):
    text = """
merge_method: task_arithmetic
base_model: {base}
modules:
  self_attn:
    models:
      - {{model: {math}, parameters: {{weight: 0.25}}}}
      - model: {code}
    parameters: {{weight: 0.5}}
  default:
    models: [model: {code}]
parameters: {{weight: 2.0}}
dtype: float32
"""
    found = merged(llamas, tmp_path, text)
    base, math, code = wide(llamas, "base", "math", "code")
    for name in found:
        math_weight, code_weight = (0.25, 0.5) if "self_attn" in name else (0.0, 2.0)
        expected = base[name] + math_weight * (math[name] - base[name]) + code_weight * (code[name] - base[name])
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)


def test_a_model_that_a_slice_does_not_name_takes_no_part_there(llamas, tmp_path):
    text = """
merge_method: linear
slices:
  - sources: [{{model: {math}, layer_range: [0, 2]}}, {{model: {code}, layer_range: [1, 3]}}]
  - sources: [{{model: {code}, layer_range: [1, 3]}}]
parameters: {{weight: 0.5}}
dtype: float32
"""
    found = merged(llamas, tmp_path, text)
    math, code = wide(llamas, "math", "code")
    name = "model.layers.{}.mlp.up_proj.weight"
    torch.testing.assert_close(found[name.format(1)], (math[name.format(1)] + code[name.format(2)]) / 2)
    assert torch.equal(found[name.format(3)], code[name.format(2)])
    assert torch.equal(found["lm_head.weight"], code["lm_head.weight"])


@pytest.mark.parametrize(
    ("told", "expected"),
    [("auto", "{{ common }}"), ("chatml", "<|im_start|>"), ("{{ mine }}", "{{ mine }}")],
)
def test_the_result_has_one_chat_template(llamas, tmp_path, told, expected):
    templates = {
        "base": "{{ common }}",
        "math": [{"name": "default", "template": "{{ common }}"}],
        "code": "{{ other }}",
    }
    for name, template in templates.items():
        shutil.copytree(llamas / name, tmp_path / name)
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "kept": 1}))
    parts = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in ("math", "code")]
    config = {"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": parts, "chat_template": told}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    out = merge_mergekit(tmp_path / "config.yml", tmp_path / "out")
    assert expected in (out / "chat_template.jinja").read_text()
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"kept": 1}


BASE = {"merge_method": "ties", "base_model": "{base}"}
MODEL = {"model": "{math}", "parameters": {"weight": 1.0, "density": 0.5}}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({**BASE, "models": [MODEL], "merge_metod": 1}, "Did you mean 'merge_method'"),
        ({"merge_method": "tie", "models": [MODEL]}, "Did you mean 'ties'"),
        ({**BASE, "models": [{**MODEL, "parameters": {"wieght": 1}}]}, "Did you mean 'weight'"),
        ({**BASE, "models": [MODEL], "parameters": {"lamda": 1}}, "Did you mean 'lambda'"),
        ({**BASE, "models": [{"model": "{math}"}]}, "parameter weight is missing for"),
        ({"merge_method": "ties", "models": [MODEL]}, "needs a base_model"),
        ({**BASE}, "either models or slices"),
        ({**BASE, "models": [{**MODEL, "parameters": {"weight": 1.0, "density": -2}}]}, "does not fit ties_merging"),
        ({**BASE, "models": [MODEL], "tokenizer_source": "mine"}, "tokenizer_source: 'mine' is not known"),
        ({**BASE, "models": [MODEL], "chat_template": "llama3"}, "'llama3' is no template. Remedy: give auto, chatml"),
        ({**BASE, "models": [MODEL], "slices": [{"sources": []}]}, "either models or slices or modules"),
        ({**BASE, "modules": {"default": {"parameters": None}}}, "module default must have either models or slices"),
        ({**BASE, "modules": {"encoder": {"models": [MODEL]}, "shared": {"models": [MODEL]}}},
         "No tensor has 'encoder' in its name"),
        ({**BASE, "modules": {"a": {"models": [MODEL]}, "b": {"models": [MODEL]}}}, "belongs to none of the modules a"),
        ({**BASE, "modules": {"a": {"slices": [{"sources": [MODEL]}]}, "b": {"models": [MODEL]}}},
         "module a is made of slices"),
        ({"merge_method": "sce", "base_model": "{base}", "modules": {
            "self_attn": {"models": [{"model": "{math}"}]}, "default": {"models": [{"model": "{code}"}]}}},
         "sce needs the same models in all slices or modules"),
        ({"merge_method": "nuslerp", "models": [MODEL, MODEL], "parameters": {"nuslerp_flatten": False}},
         "Unknown parameter in {math} 'density'"),
        ({"merge_method": "nuslerp", "models": [{"model": "{math}"}, {"model": "{code}"}],
          "parameters": {"weight": 1, "nuslerp_flatten": False}}, "takes a tensor as one vector"),
        ({"merge_method": "arcee_fusion", "models": [MODEL]}, "Unknown merge_method 'arcee_fusion'"),
        ({"merge_method": "model_stock", "base_model": "{base}", "models": [{"model": "{math}"}, {"model": "{code}"}],
          "parameters": {"filter_wise": True}}, "filter_wise=true is not known"),
        ({"merge_method": "passthrough", "slices": [{"sources": [{"model": "{math}", "layer_range": [0, 9]}]}]},
         "which has 3 layers"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_one_line_with_the_nearest_name(llamas, tmp_path, told, message):
    with pytest.raises(ConfigError) as refusal:
        merged(llamas, tmp_path, yaml.safe_dump(told))
    assert message.replace("{math}", str(llamas / "math")) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yml"]


def test_the_command_line_takes_the_file_and_says_what_differs(llamas, tmp_path, capsys):
    config = tmp_path / "dare.yml"
    parts = [{"model": str(llamas / name), "parameters": {"weight": 0.5, "density": 0.5}} for name in ("math", "code")]
    config.write_text(
        yaml.safe_dump({"merge_method": "dare_linear", "base_model": str(llamas / "base"), "models": parts})
    )
    assert main(["merge", f"mergekit={config}", f"output={tmp_path / 'out'}"]) == 0
    assert "note: What is dropped at random is another sample than mergekit's" in capsys.readouterr().out
    named = {str(llamas / name): llamas / name for name in ("math", "code")}
    expected = suture.merge(llamas / "base", named, "dare_l1", density=0.5, scaling_factor=1.0, weights=[0.5, 0.5])
    found = tiny_llama.tensors(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert main(["merge", f"mergekit={config}", f"output={tmp_path / 'out2'}", "method=dare"]) == 2
