"""Merge fine-tuned models into one, then close the representation gap.

    checkpoints → task vectors → merge → evaluate → report

Everything here is one call, and the command line has the same verbs. Heavy libraries are imported where they are used.
"""

from suture.adaptation import adapt
from suture.algorithms import SimpleAverageAlgorithm, TaskArithmeticAlgorithm, TiesMergingAlgorithm
from suture.checkpoints import Checkpoint, open_checkpoint, save_checkpoint
from suture.compatibility import compatibility
from suture.errors import SutureError
from suture.evaluation import Row, TaskInputs, evaluate, evaluate_row
from suture.merge import merge
from suture.methods import get_method, merge_method, methods
from suture.normalisation import reestimate_statistics
from suture.pipeline import demo
from suture.pools import ModelPool, TaskPool
from suture.preflight import preflight
from suture.tasks import Task

__all__ = [
    "Checkpoint",
    "ModelPool",
    "Row",
    "SimpleAverageAlgorithm",
    "SutureError",
    "Task",
    "TaskArithmeticAlgorithm",
    "TaskInputs",
    "TaskPool",
    "TiesMergingAlgorithm",
    "adapt",
    "compatibility",
    "demo",
    "evaluate",
    "evaluate_row",
    "get_method",
    "merge",
    "merge_method",
    "methods",
    "open_checkpoint",
    "preflight",
    "reestimate_statistics",
    "save_checkpoint",
]
