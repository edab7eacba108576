"""Analyses of models to merge: each is one function that returns a `Finding`, which `save` writes into a folder."""

from suture.analysis.accuracy import interpolation, landscape
from suture.analysis.finding import Finding, draws
from suture.analysis.registry import analysis_kind, analysis_kinds
from suture.analysis.representation_bias import bias
from suture.analysis.saving import save
from suture.analysis.weights import layers, similarity, trimming

__all__ = [
    "Finding",
    "analysis_kind",
    "analysis_kinds",
    "bias",
    "draws",
    "interpolation",
    "landscape",
    "layers",
    "save",
    "similarity",
    "trimming",
]
