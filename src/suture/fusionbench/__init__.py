"""Drop-in classes under FusionBench's names, thin wrappers of suture's functions."""

from suture.fusionbench.adamerging import (
    CLIPLayerWiseAdaMergingAlgorithm,
    CLIPLayerWiseAdaMergingSurgeryAlgorithm,
    CLIPTaskWiseAdaMergingAlgorithm,
    LayerWiseAdaMergingAlgorithm,
    TaskWiseAdaMergingAlgorithm,
)
from suture.fusionbench.clip_pools import CLIPVisionModelPool, CLIPVisionModelTaskPool
from suture.fusionbench.loaders import InfiniteDataLoader
from suture.fusionbench.merged_models import (
    LayerWiseMergedModel,
    TaskWiseMergedModel,
    get_layer_wise_weights,
    get_task_wise_weights,
)
from suture.fusionbench.static import SimpleAverageAlgorithm, TaskArithmeticAlgorithm, TiesMergingAlgorithm

__all__ = [
    "CLIPLayerWiseAdaMergingAlgorithm",
    "CLIPLayerWiseAdaMergingSurgeryAlgorithm",
    "CLIPTaskWiseAdaMergingAlgorithm",
    "CLIPVisionModelPool",
    "CLIPVisionModelTaskPool",
    "InfiniteDataLoader",
    "LayerWiseAdaMergingAlgorithm",
    "LayerWiseMergedModel",
    "SimpleAverageAlgorithm",
    "TaskArithmeticAlgorithm",
    "TaskWiseAdaMergingAlgorithm",
    "TaskWiseMergedModel",
    "TiesMergingAlgorithm",
    "get_layer_wise_weights",
    "get_task_wise_weights",
]
