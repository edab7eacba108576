"""AdaMerging on weights that are sharded over processes: what one process learns, in a part of its memory."""

import copy
from pathlib import Path

import pytest
import torch
from adaptation_problem import problem
from torch import nn

from suture.adaptation import adapt
from suture.core.fabric import launch, make_fabric
from suture.core.sharding import is_sharded, layer_paths, table_paths

NUMBERS = [2, pytest.param(4, marks=pytest.mark.slow)]
OPTIONS = [
    {},
    {"concatenate": False},
    {"micro_batch": 1},
    {"plus_plus": True},
    {"recompute": True},
    {"granularity": "task", "stream_vectors": True},
]


def sharded(number):
    return make_fabric({"accelerator": "cpu", "devices": number, "strategy": "fsdp"})


def learned(arguments, fabric=None, **options):
    return adapt(*arguments, max_steps=4, lr=0.1, fabric=fabric, **options)


def assert_same(one, other):
    torch.testing.assert_close(other.history, one.history, rtol=0, atol=1e-12)
    torch.testing.assert_close(other.losses, one.losses, rtol=0, atol=1e-12)
    assert list(other.merged) == list(one.merged)
    for name, tensor in one.merged.items():
        torch.testing.assert_close(other.merged[name], tensor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("options", OPTIONS)
def test_processes_with_a_part_each_find_what_one_finds(options, number):
    one = learned(problem(torch.float64), **options)
    several = launch(sharded(number), lambda f: learned(problem(torch.float64), f, **options))
    assert_same(one, several)


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=5))
    return model.eval(), lambda module, inputs: module(inputs).logits


def llama(tied=True):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=31, **sizes, tie_word_embeddings=tied)).eval()
    return model, lambda module, inputs: module(**inputs).logits[:, -1]


def llama_with_two_tables():
    return llama(tied=False)


def of(make):
    """A module, its state, three fine-tuned states, two batches a task, and its forward function."""
    torch.manual_seed(0)
    module, forward = make()
    module.double()
    base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    if make is llama:
        base["lm_head.weight"] = base["model.embed_tokens.weight"]
    shift = lambda t: t + 0.05 * torch.randn_like(t)
    models = {f"t{i}": {name: shift(t) for name, t in base.items()} for i in range(3)}
    if make is not vit:
        inputs = lambda: {"input_ids": torch.randint(31, (3, 6)), "attention_mask": torch.ones(3, 6).long()}
        for state in models.values() if make is llama else ():
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
    else:
        inputs = lambda: torch.randn(3, 3, 8, 8).double()
    return (module, base, models, {task: [inputs() for _ in range(2)] for task in models}), forward


def without_weights(module):
    """A copy whose parameters are on the meta device."""
    memo = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("make", [vit, llama, llama_with_two_tables])
def test_a_transformer_without_weights_in_memory_is_learned_from_the_files_alone(make, number):
    arguments, forward = of(make)
    one = learned(arguments, forward=forward)
    empty = (without_weights(arguments[0]), *arguments[1:])
    several = launch(sharded(number), lambda f: learned(empty, f, forward=forward, recompute=True))
    assert one.losses[0] > one.losses[-1]
    assert_same(one, several)


def test_each_process_has_its_part_of_everything():
    arguments, _ = of(llama)

    def sizes(fabric):
        from suture.adaptation.options import AdaMergingOptions
        from suture.adaptation.sharded_model import ShardedModel
        from suture.core.fabric import Team
        from suture.core.sharding import local
        from suture.merging.task_vectors import open_task_vectors

        model = ShardedModel(arguments[0], open_task_vectors(*arguments[1:3]), AdaMergingOptions(), Team(fabric))
        held = sum(local(p).numel() for p in model.module.parameters())
        rows = sum(rows.values.numel() for rows in model.separate.values())
        return torch.tensor([held, rows, sum(p.numel() for p in model.module.parameters())])

    held, rows, whole = launch(sharded(2), sizes).tolist()
    assert held <= 0.51 * whole
    assert rows == 3 * held


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_process_with_a_part_gives_freed_memory_back():
    def anonymous():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))

    def kept(fabric):
        youngest, before = [], anonymous()
        for _ in range(3):
            tensors = [torch.ones(1_000_000) for _ in range(30)]
            youngest.append(tensors[-1])
            del tensors
        return torch.tensor(anonymous() - before)

    assert 10 <= launch(sharded(2), kept) <= 60  # MB, of which three tensors of 4 MB are in use; else 120 and more


def test_layers_are_gathered_one_at_a_time_but_not_those_that_share_a_weight_with_others():
    module = nn.Module()
    module.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Tanh()])
    module.head = nn.Linear(2, 2)
    assert layer_paths(module) == ["layers.0", "layers.1"]
    module.head.weight = module.layers[1].weight
    assert layer_paths(module) == ["layers.0"]


@pytest.mark.parametrize(
    ("make", "paths"),
    [(vit, []), (llama, []), (llama_with_two_tables, ["model.embed_tokens", "lm_head"])],
)
def test_tables_of_a_vocabulary_are_gathered_apart_unless_they_are_one(make, paths):
    assert table_paths(make()[0]) == paths


def test_a_step_never_has_both_tables_of_a_vocabulary():
    arguments, forward = of(llama_with_two_tables)

    def gathered(fabric):
        seen = []

        def watched(module, inputs):
            tables = (module.model.embed_tokens, module.lm_head)
            look = lambda *given: seen.append([not is_sharded(table.weight) for table in tables])
            hooks = [part.register_forward_pre_hook(look) for part in (*tables, module.model.layers[1])]
            logits = forward(module, inputs)
            for hook in hooks:
                hook.remove()
            return logits

        learned(arguments, fabric, forward=watched)
        return torch.tensor(seen)

    seen = launch(sharded(2), gathered)
    assert seen[:3].tolist() == [[True, False], [False, False], [False, True]]
    assert seen.sum(1).max() == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"objective": "expert_kl"}, "an objective of experts' outputs"),
        ({"rank_share": 0.5}, "rank_share"),
        ({"eval_iterations": 2}, "eval_iterations"),
    ],
)
def test_what_needs_whole_weights_is_refused(options, named):
    with pytest.raises(Exception, match=rf"fabric.strategy=fsdp with {named}: each process has only a part"):
        launch(sharded(2), lambda f: learned(problem(torch.float64), f, **options))


def test_one_process_has_the_whole():
    assert_same(learned(problem(torch.float64)), launch(sharded(1), lambda f: learned(problem(torch.float64), f)))


def test_recomputed_layers_give_the_same_without_shards():
    assert_same(learned(problem(torch.float64)), learned(problem(torch.float64), recompute=True))
