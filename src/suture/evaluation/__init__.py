"""Accuracy of models on tasks."""

from suture.evaluation.accuracy import (
    BATCH_SIZE,
    Accuracy,
    Model,
    correct_answers,
    evaluate,
    evaluate_experts,
    evaluate_row,
    expert_matrix,
)
from suture.evaluation.inputs import TaskInputs, evaluation_set, task_inputs
from suture.evaluation.rows import Row

__all__ = [
    "BATCH_SIZE",
    "Accuracy",
    "Model",
    "Row",
    "TaskInputs",
    "correct_answers",
    "evaluate",
    "evaluate_experts",
    "evaluate_row",
    "evaluation_set",
    "expert_matrix",
    "task_inputs",
]
