"""Merge fine-tuned models into one, then close the representation gap.

    checkpoints → task vectors → merge → repair → evaluate → report

Everything here is one call, and the command line has the same verbs. Heavy libraries are imported where they are used.
"""

from suture.adaptation import adapt, entropy_loss
from suture.checkpoints import Checkpoint, open_checkpoint, save_checkpoint
from suture.core.head import Head
from suture.errors import SutureError
from suture.evaluation import Row, TaskInputs, evaluate, evaluate_row
from suture.file_merge import merge_files, merge_mergekit, plan_files
from suture.fusionbench import (
    CLIPLayerWiseAdaMergingAlgorithm,
    CLIPLayerWiseAdaMergingSurgeryAlgorithm,
    CLIPTaskWiseAdaMergingAlgorithm,
    CLIPVisionModelPool,
    CLIPVisionModelTaskPool,
    InfiniteDataLoader,
    LayerWiseAdaMergingAlgorithm,
    LayerWiseMergedModel,
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TaskWiseAdaMergingAlgorithm,
    TaskWiseMergedModel,
    TiesMergingAlgorithm,
    get_layer_wise_weights,
    get_task_wise_weights,
)
from suture.fusionbench.surgery import SurgeryModelWrapper
from suture.merging.batch_norm import reestimate_statistics
from suture.merging.compatibility import compatibility
from suture.merging.merge import merge
from suture.merging.registry import get_method, merge_method, methods
from suture.pipeline.analyses import analyse
from suture.pipeline.pipeline import RunResult, demo, evaluate_pool, run
from suture.pipeline.pools import ModelPool, TaskPool
from suture.pipeline.preflight import check, preflight
from suture.pipeline.pushing import push
from suture.repairs import SurgeryModel, repair
from suture.reporting import report
from suture.tasks import Task

__version__ = "0.1.0"

__all__ = [
    "CLIPLayerWiseAdaMergingAlgorithm",
    "CLIPLayerWiseAdaMergingSurgeryAlgorithm",
    "CLIPTaskWiseAdaMergingAlgorithm",
    "CLIPVisionModelPool",
    "CLIPVisionModelTaskPool",
    "Checkpoint",
    "Head",
    "InfiniteDataLoader",
    "LayerWiseAdaMergingAlgorithm",
    "LayerWiseMergedModel",
    "ModelPool",
    "Row",
    "RunResult",
    "SimpleAverageAlgorithm",
    "SurgeryModel",
    "SurgeryModelWrapper",
    "SutureError",
    "Task",
    "TaskArithmeticAlgorithm",
    "TaskInputs",
    "TaskPool",
    "TaskWiseAdaMergingAlgorithm",
    "TaskWiseMergedModel",
    "TiesMergingAlgorithm",
    "__version__",
    "adapt",
    "analyse",
    "check",
    "compatibility",
    "demo",
    "entropy_loss",
    "evaluate",
    "evaluate_pool",
    "evaluate_row",
    "get_layer_wise_weights",
    "get_method",
    "get_task_wise_weights",
    "merge",
    "merge_files",
    "merge_mergekit",
    "merge_method",
    "methods",
    "open_checkpoint",
    "plan_files",
    "preflight",
    "push",
    "reestimate_statistics",
    "repair",
    "report",
    "run",
    "save_checkpoint",
]
