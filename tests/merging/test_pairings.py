"""One model in many forms: files, live, compiled, wrapped, prefixed. Every pairing of forms merges to the same."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import suture
from suture.merging.compatibility import open_models

pytestmark = pytest.mark.filterwarnings("ignore")
_TEXT = {"vocab_size": 24, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


def _llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_TEXT, num_key_value_heads=2, **options))


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=8, n_layer=1, n_head=2, n_positions=16))


def _bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**_TEXT))


def _t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=24, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2))


def _mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**_TEXT, num_key_value_heads=2, num_local_experts=3))


ARCHITECTURES = {"llama, tied": lambda: _llama(tie_word_embeddings=True), "gpt2": _gpt2, "bert": _bert, "t5": _t5}
ARCHITECTURES["mixtral"] = _mixtral
FORMS = ("live", "mapping", "folder", "bin", "own file", "untied copies", "wrapped", "compiled", "both", "prefixed")
#: Twenty pairings of a base's form and a model's.
PAIRINGS = [
    *(("live", form) for form in FORMS[1:]),
    *((form, "folder") for form in ("live", "bin", "own file", "untied copies", "wrapped", "compiled", "prefixed")),
    *(("folder", form) for form in ("bin", "untied copies", "own file", "prefixed")),
]


def in_form(model, form, folder):
    """A model as people have it: an object, or the path of a file or folder."""
    folder.mkdir(parents=True)
    state = model.state_dict()
    if form == "folder":
        model.save_pretrained(folder)
        return folder
    if form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
        return folder
    if form == "own file":
        suture.save_checkpoint(state, folder / "x.safetensors")
        return folder / "x.safetensors"
    if form == "untied copies":
        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, folder / "x.safetensors")
        return folder / "x.safetensors"
    if form == "prefixed":
        torch.save({f"net.{name}": tensor for name, tensor in state.items()}, folder / "x.pt")
        return folder / "x.pt"
    wrapped = {"live": lambda: model, "mapping": lambda: state, "compiled": lambda: torch.compile(model)}
    wrapped |= {"wrapped": lambda: nn.DataParallel(model), "both": lambda: nn.DataParallel(torch.compile(model))}
    return wrapped[form]()


def tuned_twin(model):
    from copy import deepcopy

    twin = deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter))
    return twin


def merged_in_memory(base, model, names):
    """The merge under the names of the live model; a base of files may have names of its own."""
    found, checkpoint = (
        suture.merge(base, {"m": model}, "task_arithmetic", scaling_factor=0.5),
        open_models(base, [])[0],
    )
    every = dict(found) | {alias: found[name] for alias, name in checkpoint.aliases.items() if name in found}
    plain = lambda name: name.replace("module.", "").replace("_orig_mod.", "").removeprefix("net.")
    return {plain(name): tensor for name, tensor in every.items() if plain(name) in names}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pairing", PAIRINGS, ids=" + ".join)
def test_every_pairing_of_forms_merges_to_the_same(architecture, pairing, tmp_path):
    torch.manual_seed(0)
    base = ARCHITECTURES[architecture]().eval()
    tuned = tuned_twin(base)
    wanted = {name: t + 0.5 * (tuned.state_dict()[name] - t) for name, t in base.state_dict().items()}
    forms = [
        in_form(m, form, tmp_path / str(i)) for i, (m, form) in enumerate(zip((base, tuned), pairing, strict=True))
    ]
    found = merged_in_memory(*forms, wanted)
    storages: dict[int, set[str]] = {}
    for name, tensor in base.state_dict().items():
        if tensor.is_floating_point():
            storages.setdefault(tensor.data_ptr(), set()).add(name)
    assert all(names & found.keys() for names in storages.values())  # a folder leaves out some names of a tie
    for name in set.union(*storages.values()) & found.keys():
        torch.testing.assert_close(found[name], wanted[name], msg=name)


def test_the_file_names_of_vision_language_models_are_those_in_memory():
    names = {"language_model.model.norm.weight": "model.language_model.norm.weight"}
    names |= {"language_model.lm_head.weight": "lm_head.weight", "vision_tower.a.weight": "model.vision_tower.a.weight"}
    older = {"visual.a.weight": "model.visual.a.weight", "model.norm.weight": "model.language_model.norm.weight"}
    for table in (names, older | {"lm_head.weight": "lm_head.weight"}):
        values = {name: torch.full((2,), float(i)) for i, name in enumerate(table)}
        in_memory = {table[name]: tensor for name, tensor in values.items()}
        merged = suture.merge(in_memory, {"m": values}, "simple_average")
        assert all(torch.equal(merged[name], tensor) for name, tensor in in_memory.items())
