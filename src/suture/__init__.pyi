"""The public names, each where it is defined. `suture/__init__.py` imports them when they are first used."""

# ruff: noqa: I001

# The verbs, which the command line has too.
from .pipeline.pipeline import run as run
from .pipeline.searching import search as search
from .pipeline.preflight import check as check
from .pipeline.pipeline import evaluate_pool as evaluate_pool
from .pipeline.planning import plan as plan
from .merging.merge import merge as merge
from .adaptation import adapt as adapt, symerge as symerge
from .repairs import repair as repair
from .evaluation import evaluate as evaluate
from .reporting import report as report
from .pipeline.analyses import analyse as analyse
from .pipeline.pushing import push as push
from .file_merge import merge_files as merge_files
from .file_merge import plan_files as plan_files
from .file_merge import launch_shares as launch_shares
from .file_merge import merge_mergekit as merge_mergekit
from .file_merge import transplant as transplant
from .pipeline.demo import demo as demo
from .pipeline.starting import init as init

# Parts of a run, and the types that verbs take and return.
from .adaptation import entropy_loss as entropy_loss
from .checkpoints import (
    Checkpoint as Checkpoint,
    open_checkpoint as open_checkpoint,
    save_checkpoint as save_checkpoint,
)
from .core.head import Head as Head
from .errors import SutureError as SutureError
from .evaluation import Row as Row, TaskInputs as TaskInputs, evaluate_row as evaluate_row
from .fusionbench import (
    CLIPLayerWiseAdaMergingAlgorithm as CLIPLayerWiseAdaMergingAlgorithm,
    CLIPLayerWiseAdaMergingSurgeryAlgorithm as CLIPLayerWiseAdaMergingSurgeryAlgorithm,
    CLIPTaskWiseAdaMergingAlgorithm as CLIPTaskWiseAdaMergingAlgorithm,
    CLIPVisionModelPool as CLIPVisionModelPool,
    CLIPVisionModelTaskPool as CLIPVisionModelTaskPool,
    InfiniteDataLoader as InfiniteDataLoader,
    LayerWiseAdaMergingAlgorithm as LayerWiseAdaMergingAlgorithm,
    LayerWiseMergedModel as LayerWiseMergedModel,
    SimpleAverageAlgorithm as SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm as TaskArithmeticAlgorithm,
    TaskWiseAdaMergingAlgorithm as TaskWiseAdaMergingAlgorithm,
    TaskWiseMergedModel as TaskWiseMergedModel,
    TiesMergingAlgorithm as TiesMergingAlgorithm,
    get_layer_wise_weights as get_layer_wise_weights,
    get_task_wise_weights as get_task_wise_weights,
)
from .fusionbench.surgery import SurgeryModelWrapper as SurgeryModelWrapper
from .merging.batch_norm import reestimate_statistics as reestimate_statistics
from .merging.compatibility import compatibility as compatibility
from .merging.masking import emr_masks as emr_masks, tall_masks as tall_masks
from .merging.registry import get_method as get_method, merge_method as merge_method, methods as methods
from .merging.task_masks import TaskMasks as TaskMasks
from .pipeline.results import RunResult as RunResult
from .pipeline.searching import SearchResult as SearchResult
from .pipeline.pools import ModelPool as ModelPool, TaskPool as TaskPool
from .pipeline.preflight import preflight as preflight
from .repairs import MaskedModel as MaskedModel, SurgeryModel as SurgeryModel
from .tasks import Task as Task

# Rooms that are documented as they are.
from . import analysis as analysis, zoo as zoo
from .pipeline import config as config

__version__: str
