"""Random methods on tied tensors: the same bits from modules, mappings and files, whichever name a file keeps."""

import pytest
import torch

import suture

RANDOM = [name for name, method in suture.methods().items() if method.takes_position]
TIES = {
    "llama": ["lm_head.weight", "model.embed_tokens.weight"],
    "gpt2": ["lm_head.weight", "transformer.wte.weight"],
    "neox": ["embed_out.weight", "gpt_neox.embed_in.weight"],
    "bert": ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"],
    "t5": ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight", "shared.weight"],
}


def tied_model(seed, names):
    """One table under several names, and two other weights of the same shape."""
    generator = torch.Generator().manual_seed(seed)
    table, first, last = torch.randn(3, 9, 4, generator=generator)
    return dict.fromkeys(names, table) | {"block.0.weight": first, "z.weight": last}


def stored(model, names, kept):
    return {name: tensor for name, tensor in model.items() if name not in names or name == kept}


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.parametrize("names", TIES.values(), ids=TIES)
def test_a_tied_table_is_drawn_alike_in_memory_and_from_files(method, names, tmp_path):
    models = {label: tied_model(seed, names) for seed, label in enumerate(("base", "one", "two"))}
    in_memory = suture.merge(models["base"], {n: models[n] for n in ("one", "two")}, method)
    for kept in names:
        for label, model in models.items():
            suture.save_checkpoint(stored(model, names, kept), tmp_path / kept / f"{label}.safetensors")
        base, *tuned = (tmp_path / kept / f"{label}.safetensors" for label in models)
        fine_tuned = dict(zip(("one", "two"), tuned, strict=True))
        suture.merge_files(base, fine_tuned, method, tmp_path / f"{kept}.merged")
        from_files = suture.open_checkpoint(tmp_path / f"{kept}.merged")
        for merged in (suture.merge(base, fine_tuned, method), from_files):
            assert all(torch.equal(merged[name], in_memory[name]) for name in merged)


@pytest.mark.parametrize("method", RANDOM)
def test_a_head_that_is_not_tied_has_numbers_of_its_own(method):
    names = TIES["llama"]
    table = torch.arange(1.0, 401.0).view(100, 4)
    base, tuned = {n: torch.zeros_like(table) for n in names}, {n: table.clone() for n in names}
    merged = suture.merge(base, {"one": tuned}, method)
    assert not torch.equal(merged[names[0]], merged[names[1]])
