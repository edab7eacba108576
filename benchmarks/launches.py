"""How many operators of PyTorch a step takes: each is at least one launch on a device, and counts without one."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

VIEWS = ("view", "reshape", "slice", "select", "as_strided", "expand", "transpose", "permute", "unsqueeze", "squeeze")
VIEWS += ("t", "detach", "alias", "numpy_T", "_unsafe_view", "unflatten", "flatten", "split", "unbind", "narrow")
NOTHING = (*VIEWS, "empty", "empty_strided", "empty_like", "lift_fresh", "detach_", "_local_scalar_dense", "item")
NOTHING += ("to", "_reshape_alias", "scalar_tensor", "resolve_conj", "resolve_neg", "result_type", "set_", "resize_")
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "convolution", "convolution_backward")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
COPIES = ("copy", "cat", "index", "gather", "fill", "zero")


def operators(function: Callable[[], Any]) -> Counter[str]:
    """The operators that a call runs, without views and without those that only call others.

    A product, and an operator on a list of tensors, is one whatever it calls on a CPU.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        function()
    return Counter(name for event in found.events() if event.cpu_parent is None for name in _inside(event))


def counted(function: Callable[[], Any]) -> int:
    """The number of `operators`."""
    return operators(function).total()


def of_a_step(run: Callable[[int], Any], few: int = 2, more: int = 4) -> dict[str, float]:
    """Operators of one step, by kind, from two runs of `run(steps)`: what comes before and after cancels out."""
    least, most = operators(lambda: run(few)), operators(lambda: run(more))
    most.subtract(least)
    kinds = {"all": most.total() / (more - few), "products": 0.0, "copies": 0.0, "others": 0.0}
    for name, count in most.items():
        kinds[_kind(name)] += count / (more - few)
    return kinds


def line(name: str, kinds: Mapping[str, float]) -> str:
    """A row of the table."""
    parts = ", ".join(f"{kind} {kinds[kind]:.0f}" for kind in ("products", "copies", "others"))
    return f"{name:44s} {kinds['all']:7.0f} operators a step: {parts}"


def _inside(event: Any) -> Iterator[str]:
    name = event.name.removeprefix("aten::")
    if event.name.startswith("aten::") and (_is_one(name) or not event.cpu_children):
        yield from () if name in NOTHING else (name,)
        return
    for child in event.cpu_children:
        yield from _inside(child)


def _is_one(name: str) -> bool:
    return name in PRODUCTS or name.startswith((ATTENTION, "_foreach_", "_fused_", "native_layer_norm"))


def _kind(name: str) -> str:
    if name in PRODUCTS or name.startswith(ATTENTION):
        return "products"
    return "copies" if any(word in name for word in COPIES) else "others"
