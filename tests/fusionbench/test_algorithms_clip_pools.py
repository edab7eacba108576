"""Pools as classes: the towers by name, merged by any algorithm, and scored on tasks."""

import pytest
import torch

import suture
from suture.errors import ConfigError


@pytest.fixture
def pools(desk):
    return suture.CLIPVisionModelPool(desk.models), suture.CLIPVisionModelTaskPool(
        desk.tasks, desk.models["_pretrained_"]
    )


def test_the_towers_of_a_pool_are_read_by_name(pools, desk):
    pool, _ = pools
    assert list(pool) == ["_pretrained_", "first", "second"]
    state = pool.load_model("first").state_dict()
    for name, tensor in desk.tensors("first").items():
        assert torch.equal(state[name], tensor)


def test_a_pool_is_merged_by_an_algorithm_and_scored(pools):
    pool, tasks = pools
    merged = suture.TaskArithmeticAlgorithm(scaling_factor=0.3).run(pool)
    report = tasks.evaluate(merged)
    assert list(report) == ["first", "second", "average"]
    assert report["first"]["samples"] == 12
    assert report["average"]["accuracy"] == pytest.approx(
        (report["first"]["accuracy"] + report["second"]["accuracy"]) / 2
    )


def test_a_model_of_transformers_scores_like_the_tower(pools, desk):
    from transformers import CLIPModel

    pool, tasks = pools
    assert tasks.evaluate(CLIPModel.from_pretrained(desk.models["_pretrained_"])) == tasks.evaluate(
        pool["_pretrained_"]
    )


def test_pools_of_both_classes_are_taken_by_the_adapting_algorithms(pools):
    merged = suture.CLIPLayerWiseAdaMergingAlgorithm(max_steps=2).run(*pools)
    assert merged(torch.zeros(1, 3, 16, 16)).shape == (1, 8)


def test_shipped_pools_go_by_their_names():
    assert suture.CLIPVisionModelPool("clip-vit-base-patch32_TA8").pool.base == "openai/clip-vit-base-patch32"
    assert suture.CLIPVisionModelTaskPool(["mnist", "dtd"]).task_names == ["mnist", "dtd"]
    assert len(suture.CLIPVisionModelTaskPool("clip-vit-classification_TALL20").task_names) == 20


def test_an_unknown_model_and_a_pool_without_a_base_are_refused(pools):
    with pytest.raises(ConfigError, match=r"'frist'.*'first'"):
        pools[0].load_model("frist")
    with pytest.raises(ConfigError, match="_pretrained_"):
        suture.CLIPVisionModelPool({"first": "somewhere"})
