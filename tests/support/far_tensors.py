"""A stand-in for a device: tensors that compute on the CPU but, like a GPU's, refuse to be mixed with the CPU's.

It stands in where there is no GPU. What can be shown without one is that nothing of a slice stays behind when it is
merged elsewhere, and that nothing else decides the result. Numbers without dimensions may be mixed, as on a GPU.
"""

import torch
from torch.utils._pytree import tree_map

FAR = torch.device("cuda:0")
_COPY = torch.ops.aten.copy_.default


class Far(torch.Tensor):
    """A tensor that tells Python it is on the device; `near` is its memory."""

    near: torch.Tensor
    operations = 0
    device = property(lambda self: FAR)

    @staticmethod
    def __new__(cls, near):
        size = {"strides": near.stride(), "storage_offset": near.storage_offset()}
        return cls._make_wrapper_subclass(cls, near.shape, dtype=near.dtype, **size)

    def __init__(self, near):
        self.near = near

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        mine = {}

        def near(value):
            if isinstance(value, Far):
                mine[id(value.near)] = value
                return value.near
            if isinstance(value, torch.Tensor) and value.ndim and function is not _COPY:
                raise RuntimeError(f"{function}: found a CPU tensor of shape {tuple(value.shape)} among the device's.")
            return value

        def far(value):
            if not isinstance(value, torch.Tensor):
                return value
            return mine[id(value)] if id(value) in mine else Far(value)

        found, Far.operations = function(*tree_map(near, args), **tree_map(near, kwargs or {})), Far.operations + 1
        return mine.get(id(found), found) if function is _COPY else tree_map(far, found)


REAL = torch.cuda.is_available()  # then the tests run on the GPU itself


def reach(monkeypatch):
    """Let the device be found, and tensors be sent to it and back; a GPU that is there is used instead."""
    if REAL:
        return
    send, fetch = torch.Tensor.to, torch.Tensor.cpu

    def to(tensor, *args, **kwargs):
        if args and isinstance(args[0], str | torch.device) and torch.device(args[0]).type == FAR.type:
            return tensor if isinstance(tensor, Far) else Far(tensor.clone())
        return send(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.near if isinstance(tensor, Far) else fetch(tensor))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
