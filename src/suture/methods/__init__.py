"""Merge methods: one paper, one file, one function of tensors."""

from suture.methods.counter_random import Place
from suture.methods.registry import MergeMethod, get_method, merge_method, methods
from suture.methods.simple_average import simple_average
from suture.methods.task_arithmetic import task_arithmetic
from suture.methods.ties_merging import TiesStatistic, settle, ties_merging, ties_rows, trim_thresholds

__all__ = [
    "MergeMethod",
    "Place",
    "TiesStatistic",
    "get_method",
    "merge_method",
    "methods",
    "settle",
    "simple_average",
    "task_arithmetic",
    "ties_merging",
    "ties_rows",
    "trim_thresholds",
]
