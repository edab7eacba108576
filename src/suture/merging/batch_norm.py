"""New running statistics for a merged model's BatchNorm layers, measured on unlabelled inputs.

Merging averages the means and variances that BatchNorm layers hold, but these describe the activations of the unmerged
models. New statistics help a lot where the models were trained with batch statistics, and do harm where they were
trained with frozen ones. So this is a separate step and never automatic.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from suture.core.batches import Reached, device_of, to_device
from suture.core.progress import Track, untracked
from suture.errors import ConfigError, DataError

Forward = Callable[[nn.Module, Any], Any]


@torch.no_grad()
def reestimate_statistics(
    module: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None, track: Track = untracked
) -> dict[str, Tensor]:
    """New `running_mean` and `running_var` for every BatchNorm layer that the inputs reach: name → tensor.

    Each layer gets the mean and the unbiased variance (as in torch) over all inputs and positions together, so neither
    the size nor the order of the batches matters; sums are in float64. The layers are measured one after another, each
    behind layers that already have their new statistics, because that is how the module will be used. This takes one
    pass over the inputs per layer. Everything else is in evaluation mode, and `momentum` is ignored.

    `batches` are tensors, or mappings for keyword arguments. They are read several times and must be the same each
    time: a list, or a DataLoader without random augmentation. `forward(module, batch)` replaces the plain call. The
    module is not changed; load the result with `module.load_state_dict(result, strict=False)`, or put it into a merged
    mapping.

    Raises `ConfigError` for a module without such layers, one that uses a layer twice, or batches that can be read only
    once, and `DataError` where a layer sees fewer than two values per channel.

    >>> layer, batches = nn.BatchNorm1d(1), [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])]
    >>> reestimate_statistics(layer, batches)
    {'running_mean': tensor([3.]), 'running_var': tensor([7.])}
    """
    if isinstance(batches, Iterator):
        raise ConfigError(
            "The batches can be read only once, but every layer needs them. Remedy: give a list of batches."
        )
    module = copy.deepcopy(module).eval()
    layers = {name: layer for name, layer in module.named_modules() if _has_statistics(layer)}
    if not layers:
        raise ConfigError(f"{type(module).__name__} has no BatchNorm layer that keeps statistics: nothing to measure.")
    run = forward or _call
    order = _order_of_use(module, layers, next(iter(batches), None), run)
    with track("Measuring statistics", len(order)) as advance:
        for name in order:
            _measure(module, name, layers[name], batches, run)
            advance(1)
    buffers = module.state_dict()
    names = [f"{name}.{kind}".lstrip(".") for name in order for kind in ("running_mean", "running_var")]
    return {name: buffers[name] for name in names}


class Moments:
    """Mean and variance over batches, merged as they come (Chan, Golub and LeVeque 1979)."""

    def __init__(self):
        self.count = 0
        self.mean, self.squares = torch.zeros(()), torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Add values of shape (batch, channel, …)."""
        values = values.double().transpose(0, 1).flatten(1)
        count, mean = values.shape[1], values.mean(1)
        share = count / (self.count + count)
        shift = mean - self.mean.to(mean)
        self.squares = self.squares.to(mean) + (values - mean[:, None]).square().sum(1) + shift**2 * share * self.count
        self.mean = self.mean.to(mean) + shift * share
        self.count += count


def _has_statistics(layer: nn.Module) -> bool:
    """Whether a layer is torch's BatchNorm or another library's frozen one, which has the same two buffers."""
    buffers = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
    return all(isinstance(t, Tensor) for t in buffers) and not isinstance(layer, nn.modules.instancenorm._InstanceNorm)


def _order_of_use(module: nn.Module, layers: Mapping[str, nn.Module], batch: Any, run: Forward) -> list[str]:
    """The names of the layers that a batch reaches, in that order."""
    if batch is None:
        raise DataError("There are no batches to measure statistics on.")
    order: list[str] = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name, layer in layers.items()
    ]
    with _removed_afterwards(hooks):
        run(module, to_device(batch, device_of(module)))
    twice = next((name for name in order if order.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"'{twice}' is used more than once in a pass, so its statistics depend on themselves.")
    if not order:
        raise ConfigError(f"The inputs reach none of the BatchNorm layers {', '.join(map(repr, layers))}.")
    return order


def _measure(module: nn.Module, name: str, layer: Any, batches: Iterable[Any], run: Forward) -> None:
    """Give one layer the statistics of its inputs over all batches."""
    moments = Moments()

    def add_inputs(_, inputs):
        moments.add(inputs[0])
        raise Reached

    with _removed_afterwards([layer.register_forward_pre_hook(add_inputs)]):
        for batch in batches:
            with suppress(Reached):
                run(module, to_device(batch, device_of(module)))
    if moments.count < 2:
        raise DataError(f"'{name}' sees {moments.count} value for each channel; a variance needs 2 or more.")
    layer.running_mean.copy_(moments.mean)
    layer.running_var.copy_(moments.squares / (moments.count - 1))


def _call(module: nn.Module, batch: Any) -> Any:
    if isinstance(batch, tuple | list):
        raise ConfigError(
            "A batch is a tuple. Remedy: give forward=lambda module, batch: module(batch[0]), or inputs alone."
        )
    return module(**batch) if isinstance(batch, Mapping) else module(batch)


@contextmanager
def _removed_afterwards(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
