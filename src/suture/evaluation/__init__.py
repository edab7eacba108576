"""Accuracy of models on tasks."""

from suture.evaluation.accuracy import BATCH_SIZE, Accuracy, Model, Scorer, evaluate, evaluate_row
from suture.evaluation.inputs import SplitInputs, TaskInputs, as_task, evaluation_set, task_inputs
from suture.evaluation.intervals import Interval, mean_interval, over_seeds, wilson
from suture.evaluation.rows import Role, Row

__all__ = [
    "BATCH_SIZE",
    "Accuracy",
    "Interval",
    "Model",
    "Role",
    "Row",
    "Scorer",
    "SplitInputs",
    "TaskInputs",
    "as_task",
    "evaluate",
    "evaluate_row",
    "evaluation_set",
    "mean_interval",
    "over_seeds",
    "task_inputs",
    "wilson",
]
