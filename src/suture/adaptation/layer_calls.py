"""The layers of a module as they run: each use of a weight, with its inputs and outputs.

Uses are seen where torch's functions are called, not at modules, so attention that projects by itself
(`nn.MultiheadAttention`), GPT-2's transposed layers and single matrices of a stack are found too.
"""

import inspect
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Kind = Literal["matrix", "conv", "norm", "batch_norm"]
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_OWN_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


class Layer(NamedTuple):
    """A weight in use: a matrix, a kernel, or the scale of a normalisation.

    `weight` and `bias` are names of parameters; for a BatchNorm layer `weight` is the name of its running mean. A
    matrix may be `size` rows of a larger parameter, from `start` on; a `transposed` one is stored as (in, out). The
    inputs of a `routed` one, a single expert's of a stack, are those that the model sends to it.
    """

    kind: Kind
    weight: str
    bias: str | None = None
    start: int = 0
    size: int = 0
    transposed: bool = False
    groups: int = 1
    routed: bool = False


class Window(NamedTuple):
    """Kernel size, stride, padding and dilation of a convolution, one number an axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One use of a layer.

    `input` is (…, in), an image (B, C, …), or for a norm the normalised input (…, C) before scale and shift, and for a
    BatchNorm layer its raw input (…, C). `output` is (…, out) or (B, out, …), with the bias; None for norms.
    """

    layer: Layer
    input: Tensor
    output: Tensor | None = None
    window: Window | None = None
    fused: bool = False

    def rows(self) -> Float[Tensor, "group row in"]:
        """The inputs, one row a position: for a convolution its patches."""
        if self.window is not None:
            return _patches(self.input, self.window, self.layer.groups)
        return self.input.flatten(0, -2)[None]

    def results(self) -> Float[Tensor, "group row out"]:
        """The outputs, one row a position."""
        assert self.output is not None
        if self.window is None:
            return self.output.flatten(0, -2)[None]
        rows = self.output.movedim(1, -1).flatten(0, -2)
        return rows.unflatten(1, (self.layer.groups, -1)).movedim(1, 0)

    def part(self, which: slice) -> "Call":
        """The same call for some images of the batch."""
        return replace(self, input=self.input[which], output=None if self.output is None else self.output[which])

    @property
    def positions(self) -> torch.Size:
        """The shape of the rows before they are flattened."""
        if self.window is None:
            return self.input.shape[:-1]
        assert self.output is not None
        return torch.Size((len(self.output), *self.output.shape[2:]))


See = Callable[[Call], Tensor | None]


class LayerCalls(TorchFunctionMode):
    """Inside the block, `see(call)` gets every use of a layer of `module`, in order.

    What it returns, if not None, replaces the layer's output. The inputs of norms are only normalised `with_norms`.
    """

    def __init__(self, module: nn.Module, see: See, *, with_norms: bool = False):
        super().__init__()
        self._see, self._norms = see, with_norms
        self._names = _Names(module)
        self._scaled = [(name, part) for name, part in module.named_modules() if with_norms and _only_scales(part)]
        self._hooks: list[Any] = []
        self._evaluating = False

    def __enter__(self) -> "LayerCalls":
        self._hooks = [part.register_forward_hook(partial(self._after_norm, name)) for name, part in self._scaled]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func in _CONVOLUTIONS:
            return self._convolution(func, *args, **kwargs)
        if func is getattr(torch, "_grouped_mm", None):
            return self._grouped(func, *args, **kwargs)
        if func is torch.addmm and not kwargs:
            return self._transposed(*args)
        if func is F.multi_head_attention_forward:
            return self._attention(inspect.signature(func).bind(*args, **kwargs).arguments)
        if self._norms and func in (F.layer_norm, F.group_norm, F.batch_norm):
            self._norm(func, inspect.signature(func).bind(*args, **kwargs).arguments)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._used(self._names.matrix(weight, bias), input, F.linear(input, weight, bias))

    def _transposed(self, bias: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        layer = self._names.matrix(weight.T, bias)
        return self._used(layer if layer and layer.transposed else None, input, torch.addmm(bias, input, weight))

    def _grouped(self, func: Any, input: Tensor, weight: Tensor, *, offs: Tensor | None = None, **named: Any) -> Tensor:
        """A stack of experts (expert, in, out) on the rows that are sent to each: up to `offs` of it."""
        output = func(input, weight, offs=offs, **named)
        if offs is None or input.dim() != 2 or weight.dim() != 3:
            return output
        for matrix, stop, start in zip(weight, stops := offs.tolist(), [0, *stops[:-1]], strict=True):
            self._used(self._names.matrix(matrix.T, None), input[start:stop], output[start:stop])
        return output

    def _used(self, layer: Layer | None, input: Tensor, output: Tensor, **facts: Any) -> Tensor:
        changed = None if layer is None else self._see(Call(layer, input, output, **facts))
        return output if changed is None else changed

    def _convolution(self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **named):
        output = func(input, weight, bias, *rest, **named)
        layer = self._names.kernel(weight, bias, _option(rest, named, 3, "groups", 1))
        if layer is None or input.dim() != weight.dim():
            return output
        return self._used(layer, input, output, window=_window(weight, rest, named))

    def _attention(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """`nn.MultiheadAttention`: its projections are seen, the last one on what attention gives."""
        for weight, bias, input in _projections(arguments):
            self._used(self._names.matrix(weight, bias), input, F.linear(input, weight, bias), fused=True)
        weight, bias = arguments["out_proj_weight"], arguments["out_proj_bias"]
        plain = {"out_proj_weight": torch.eye(len(weight)).to(weight), "out_proj_bias": None}
        attended, shares = F.multi_head_attention_forward(**arguments | plain)
        return self._linear(attended, weight, bias), shares

    def _norm(self, func: Any, arguments: dict[str, Any]) -> None:
        input, weight, bias = arguments["input"], arguments.get("weight"), arguments.get("bias")
        if func is F.batch_norm:
            if name := self._names.exact(arguments["running_mean"]):
                self._see(Call(Layer("batch_norm", name), input.movedim(1, -1)))
            return
        name = self._names.exact(weight)
        if name is None or weight is None or weight.dim() != 1:
            return
        normalised = func(**{key: arguments[key] for key in arguments if key not in ("weight", "bias")})
        rows = normalised.movedim(1, -1) if func is F.group_norm else normalised
        self._see(Call(Layer("norm", name, self._names.exact(bias)), rows))

    def _after_norm(self, path: str, module: nn.Module, arguments: Any, output: Any) -> None:
        """A norm of another library: its output is affine in its scale, so two evaluations give its input."""
        if self._evaluating:
            return
        weight = module.get_parameter("weight")
        self._evaluating = True
        try:
            one = functional_call(module, {"weight": torch.ones_like(weight)}, arguments)
            zero = functional_call(module, {"weight": torch.zeros_like(weight)}, arguments)
        finally:
            self._evaluating = False
        self._see(Call(Layer("norm", f"{path}.weight".lstrip(".")), one - zero))


class _Names:
    """The names of a module's tensors, found by their memory; tied ones have one name."""

    def __init__(self, module: nn.Module):
        self._tensors: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.numel() and not tensor.is_meta:
                self._tensors.setdefault(tensor.data_ptr(), (name, tensor))
        self._starts = sorted(self._tensors)

    def exact(self, tensor: Tensor | None) -> str | None:
        """The name of a tensor that is whole."""
        name, whole = self._tensors.get(0 if tensor is None else tensor.data_ptr(), (None, None))
        return name if tensor is not None and whole is not None and whole.shape == tensor.shape else None

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Layer | None:
        """The layer of a matrix (out, in), which may be part of a parameter, or transposed."""
        name, whole, entry = self._around(weight)
        if name is None or whole is None or weight.dim() != 2 or not whole.is_contiguous():
            return None
        out, width = weight.shape
        if whole.shape == (width, out) and weight.stride() == (1, out):
            return Layer("matrix", name, self.exact(bias), 0, out, True)
        if weight.stride() != (width, 1) or whole.shape[-1] != width or entry % width:
            return None
        start = entry // width
        bias_name, _, first = self._around(bias)
        bias_name = bias_name if first == start else None
        return Layer("matrix", name, bias_name, start, out, routed=whole.dim() > 2)

    def kernel(self, weight: Tensor, bias: Tensor | None, groups: int) -> Layer | None:
        """The layer of a kernel (out, in / groups, …)."""
        name = self.exact(weight)
        return None if name is None else Layer("conv", name, self.exact(bias), 0, len(weight), False, groups)

    def _around(self, part: Tensor | None) -> tuple[str | None, Tensor | None, int]:
        """The tensor that `part` lies in, and the entry of it that `part` begins at."""
        at = 0 if part is None else bisect_right(self._starts, part.data_ptr())
        if part is None or at == 0:
            return None, None, -1
        begin = self._starts[at - 1]
        name, whole = self._tensors[begin]
        entry = (part.data_ptr() - begin) // whole.itemsize
        fits = part.dtype == whole.dtype and entry + part.numel() <= whole.numel()
        return (name, whole, entry) if fits else (None, None, -1)


def _only_scales(module: nn.Module) -> bool:
    """Whether a module is an RMSNorm or another norm with a scale alone, of whatever library."""
    names = [name for name, _ in module.named_parameters()]
    norm = "Norm" in type(module).__name__ and not isinstance(module, _OWN_NORMS)
    return norm and names == ["weight"] and module.get_parameter("weight").dim() == 1


def _projections(arguments: Mapping[str, Any]) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Weight, bias and input of the projections before attention: one, or one each of query, key and value."""
    inputs = [arguments[name] for name in ("query", "key", "value")]
    bias, width = arguments.get("in_proj_bias"), inputs[0].shape[-1]
    biases = [None] * 3 if bias is None else list(bias.split(width))
    if arguments.get("use_separate_proj_weight"):
        weights = [arguments[f"{name}_proj_weight"] for name in ("q", "k", "v")]
    elif inputs[0] is inputs[1] is inputs[2]:
        return [(arguments["in_proj_weight"], bias, inputs[0])]
    else:
        weights = list(arguments["in_proj_weight"].split(width))
    return list(zip(weights, biases, inputs, strict=True))


def _option(rest: tuple, named: Mapping[str, Any], position: int, name: str, default: Any) -> Any:
    return named.get(name, rest[position] if len(rest) > position else default)


def _window(weight: Tensor, rest: tuple, named: Mapping[str, Any]) -> Window:
    kernel, each = tuple(weight.shape[2:]), weight.dim() - 2
    names = (("stride", 1), ("padding", 0), ("dilation", 1))
    stride, padding, dilation = (_option(rest, named, i, *name) for i, name in enumerate(names))
    spread = [(value,) * each if isinstance(value, int) else value for value in (stride, padding, dilation)]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(spread[2], kernel, strict=True)]
        sides = tuple((t // 2, t - t // 2) for t in total)
    else:
        sides = tuple((p, p) for p in ((0,) * each if padding == "valid" else spread[1]))
    full = [tuple(values) * (each if len(values) == 1 else 1) for values in (spread[0], spread[2])]
    return Window(kernel, full[0], sides if len(sides) == each else sides * each, full[1])


def _patches(image: Tensor, window: Window, groups: int) -> Float[Tensor, "group row in"]:
    """(B, C, …) → the patches that a kernel is applied to, one row a position."""
    each = len(window.kernel)
    x = F.pad(image, [side for sides in reversed(window.padding) for side in sides])
    for axis, (kernel, step, dilation) in enumerate(zip(window.kernel, window.stride, window.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (kernel - 1) + 1, step)[..., ::dilation]
    x = x.movedim(1, 1 + each).flatten(0, each)
    return x.unflatten(1, (groups, -1)).movedim(1, 0).flatten(2)
