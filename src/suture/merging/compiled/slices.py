"""A slice of every model as compiled loops take it: addresses of entries in the dtypes of their files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in `loops`


@dataclass(frozen=True)
class Slices:
    """The same entries of the base and of every model; it keeps the tensors whose addresses it gives."""

    base: Tensor
    models: Sequence[Tensor]

    @classmethod
    def of(cls, base: Tensor, models: Sequence[Tensor]) -> "Slices | None":
        """The slices; None for tensors that the kernels do not take: on a device, strided, or of another dtype."""
        parts = [base, *models]
        if base.is_conj() or not all(p.dtype in _KINDS and type(p) is Tensor and p.device.type == "cpu" for p in parts):
            return None
        return cls(base.contiguous(), [model.contiguous() for model in models])

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The first arguments of every kernel: (models, kinds, base, base_kind, count)."""
        addresses = np.array([model.data_ptr() for model in self.models], dtype=np.int64)
        kinds = np.array([_KINDS[model.dtype] for model in self.models], dtype=np.int64)
        return addresses, kinds, self.base.data_ptr(), _KINDS[self.base.dtype], len(self.base)
