"""Checkpoints: whatever holds weights, as one mapping name → tensor.

What happens to the tensors that are no ordinary weights:

- Tied tensors (several names of one storage, offset, shape and stride) are one tensor. The first name in
  sorted order counts, the others are `aliases`; it is read once, merged once and written once, and comes back
  under all its names. Views that overlap only in part are separate tensors and are written as such.
- 0-dim tensors stay 0-dim.
- Integer and bool buffers (`num_batches_tracked`, `position_ids`, masks) keep their dtype; merging takes them
  from the base and never averages them.
- Float buffers (the running statistics of BatchNorm) are merged like weights.
- Every dtype is kept, but codes of low precision are decoded (`decoding`). Sparse, meta, complex and other quantised
  tensors are refused.
"""

from suture.checkpoints.adapters import open_fine_tuned
from suture.checkpoints.checkpoint import Checkpoint, Factors, Parts, TensorSpec
from suture.checkpoints.opening import Source, open_checkpoint
from suture.checkpoints.provenance import content_hash, file_sha256, provenance_of
from suture.checkpoints.writing import allocate_checkpoint, save_checkpoint
from suture.storage.atomic import new_directory
from suture.storage.cache import cache_directory

__all__ = [
    "Checkpoint",
    "Factors",
    "Parts",
    "Source",
    "TensorSpec",
    "allocate_checkpoint",
    "cache_directory",
    "content_hash",
    "file_sha256",
    "new_directory",
    "open_checkpoint",
    "open_fine_tuned",
    "provenance_of",
    "save_checkpoint",
]
