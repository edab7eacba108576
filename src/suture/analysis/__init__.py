"""What merging has to work with, and where it hurts: each analysis is one function that returns a `Finding`."""

from suture.analysis.accuracy import interpolation, landscape
from suture.analysis.bias import bias
from suture.analysis.finding import Finding
from suture.analysis.weights import layers, similarity, trimming

__all__ = ["Finding", "bias", "interpolation", "landscape", "layers", "similarity", "trimming"]
