"""Merge methods: one paper, one file, one function of tensors."""

from suture.methods.breadcrumbs import breadcrumbs
from suture.methods.breadcrumbs_ties import breadcrumbs_ties
from suture.methods.counter_random import Place
from suture.methods.dare import dare
from suture.methods.dare_l1 import dare_l1
from suture.methods.dare_ties import dare_ties
from suture.methods.della import della
from suture.methods.della_linear import della_linear
from suture.methods.karcher import karcher
from suture.methods.model_stock import model_stock
from suture.methods.multislerp import multislerp
from suture.methods.nearswap import nearswap
from suture.methods.nuslerp import nuslerp
from suture.methods.passthrough import passthrough
from suture.methods.ram import ram, ramplus_tl
from suture.methods.registry import MergeMethod, get_method, merge_method, methods
from suture.methods.sce import sce
from suture.methods.simple_average import simple_average
from suture.methods.slerp import slerp
from suture.methods.streams import DeltaStream
from suture.methods.task_arithmetic import task_arithmetic
from suture.methods.ties_merging import (
    TiesStatistic,
    as_merged,
    settle,
    ties_merging,
    ties_rows,
    trim_thresholds,
)

__all__ = [
    "DeltaStream",
    "MergeMethod",
    "Place",
    "TiesStatistic",
    "as_merged",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare",
    "dare_l1",
    "dare_ties",
    "della",
    "della_linear",
    "get_method",
    "karcher",
    "merge_method",
    "methods",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "ram",
    "ramplus_tl",
    "sce",
    "settle",
    "simple_average",
    "slerp",
    "task_arithmetic",
    "ties_merging",
    "ties_rows",
    "trim_thresholds",
]
