"""FusionBench's class of the same name: one module on the final feature for each dataset, called by its name."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from suture.core.batches import call
from suture.errors import ConfigError, unknown_name
from suture.repairs.modules import SurgeryModules


class SurgeryModelWrapper(nn.Module):
    """`model` with a trainable surgery module of rank `hidden_dim` for each name in `test_datasets`.

    `model(x)` gives features (B, projection_dim), through `forward(model, x)` if that is given; its own parameters are
    left as they are, so train those of `collect_trainable_params`. Called with inputs alone, or with keyword arguments,
    the wrapper gives what the model gives, as in FusionBench.

    >>> import torch
    >>> wrapper = SurgeryModelWrapper(nn.Linear(3, 8), ["mnist", "cars"], projection_dim=8, hidden_dim=2)
    >>> x = torch.zeros(5, 3)
    >>> after, before, correction = wrapper.compute_surgery_features(lambda model: model(x), "mnist")
    >>> torch.equal(after, before - correction)
    True
    """

    is_surgery_model = True

    def __init__(
        self,
        model: nn.Module,
        test_datasets: Iterable[str],
        projection_dim: int = 512,
        hidden_dim: int = 16,
        *,
        forward: Any = call,
        seed: int = 0,
    ):
        super().__init__()
        self.model, self.encode, self.test_datasets = model, forward, []
        self.projection_dim, self.hidden_dim, self.seed = projection_dim, hidden_dim, seed
        self.surgery_modules = nn.ModuleList()  # one for each dataset: Adam leaves those without a gradient alone
        for name in test_datasets:
            self.add_surgery_module(name)

    def add_surgery_module(self, dataset_name: str) -> None:
        """Add the module of one more dataset: at first it corrects nothing."""
        if dataset_name in self.test_datasets:
            raise ConfigError(f"The wrapper has a module for {dataset_name!r} already.")
        module = SurgeryModules([dataset_name], self.projection_dim, self.hidden_dim, seed=self.seed)
        self.surgery_modules.append(module)
        self.test_datasets.append(dataset_name)

    def collect_trainable_params(self) -> list[nn.Parameter]:
        """The two matrices of every dataset's module."""
        return list(self.surgery_modules.parameters())

    def compute_features(self, x: Any) -> Tensor:
        """The model's features, before any surgery."""
        return self.encode(self.model, x)

    def compute_surgery_features(
        self, compute_features_fn: Tensor | Callable[[nn.Module], Tensor], dataset_name: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(features after surgery, features before, the correction that was subtracted), each (B, projection_dim).

        In FusionBench's order. `compute_features_fn(model)` gives the features; they may also be given themselves.
        """
        if dataset_name not in self.test_datasets:
            raise ConfigError(unknown_name("dataset", dataset_name, self.test_datasets))
        before = compute_features_fn if isinstance(compute_features_fn, Tensor) else compute_features_fn(self.model)
        module = self.surgery_modules[self.test_datasets.index(dataset_name)]
        after = module(before[:, None], slice(0, 1))[:, 0]
        return after, before, before - after

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives; with inputs and a dataset's name the features (after, correction, before)."""
        if (len(args) == 2 and isinstance(args[1], str)) or "dataset_name" in kwargs:
            return self._repaired(*args, **kwargs)
        return self.model(*args, **kwargs)

    def _repaired(self, x: Any, dataset_name: str) -> tuple[Tensor, Tensor, Tensor]:
        after, before, correction = self.compute_surgery_features(lambda _: self.compute_features(x), dataset_name)
        return after, correction, before
