"""FusionBench's `SurgeryModelWrapper`: one module on the final feature per dataset, chosen by the dataset's name."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from suture.core.batches import call
from suture.errors import ConfigError, unknown_name
from suture.repairs.modules import SurgeryModules


class SurgeryModelWrapper(nn.Module):
    """`model` with a trainable surgery module of rank `hidden_dim` for each name in `test_datasets`.

    `model(x)`, or `forward(model, x)` if given, returns features (B, projection_dim). The model's own parameters are
    not frozen, so train those of `collect_trainable_params`. Called with inputs alone, or with keyword arguments, the
    wrapper returns the model's output, as in FusionBench.

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
        self.model, self.encode = model, forward
        self.projection_dim, self.hidden_dim = projection_dim, hidden_dim
        self.seed = seed
        self.test_datasets: list[str] = []
        self.surgery_modules = nn.ModuleList()  # one per dataset, because Adam skips parameters without a gradient
        for name in test_datasets:
            self.add_surgery_module(name)

    def add_surgery_module(self, dataset_name: str) -> None:
        """Add the module of one more dataset; until it is trained, it corrects nothing."""
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
        """(features after surgery, features before, the correction subtracted), each (B, projection_dim).

        The order is FusionBench's. `compute_features_fn` is a function model → features, or the features themselves.
        """
        if dataset_name not in self.test_datasets:
            raise ConfigError(unknown_name("dataset", dataset_name, self.test_datasets))
        before = compute_features_fn if isinstance(compute_features_fn, Tensor) else compute_features_fn(self.model)
        module = self.surgery_modules[self.test_datasets.index(dataset_name)]
        after = module(before[:, None], slice(0, 1))[:, 0]
        return after, before, before - after

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output; for inputs with a dataset's name, the features (after, correction, before)."""
        if (len(args) == 2 and isinstance(args[1], str)) or "dataset_name" in kwargs:
            return self._repaired(*args, **kwargs)
        return self.model(*args, **kwargs)

    def _repaired(self, x: Any, dataset_name: str) -> tuple[Tensor, Tensor, Tensor]:
        after, before, correction = self.compute_surgery_features(lambda _: self.compute_features(x), dataset_name)
        return after, correction, before
