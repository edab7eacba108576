"""Compiled loops for merges on a CPU, with the bits of the plain path: `pip install 'suture[fast]'`."""

from suture.merging.compiled.loading import compiled_loops, worth_it
from suture.merging.compiled.methods import COMPILED, Compiled
from suture.merging.compiled.slices import Slices

__all__ = ["COMPILED", "Compiled", "Slices", "compiled_loops", "worth_it"]
