"""FusionBench's class of the same name: one module on the final feature for each dataset, called by its name."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from suture.core.batches import call
from suture.errors import ConfigError, unknown_name
from suture.repairs.modules import SurgeryModules


class SurgeryModelWrapper(nn.Module):
    """`model` with a trainable surgery module of rank `hidden_dim` for each name in `test_datasets`.

    `model(x)` gives features (B, projection_dim), through `forward(model, x)` if that is given; its own parameters are
    left as they are.

    >>> import torch
    >>> wrapper = SurgeryModelWrapper(nn.Linear(3, 8), ["mnist", "cars"], projection_dim=8, hidden_dim=2)
    >>> after, correction, before = wrapper(torch.zeros(5, 3), "mnist")
    >>> torch.equal(after, before - correction)
    True
    """

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
        self.model, self.encode, self.test_datasets = model, forward, tuple(test_datasets)
        self.modules_by_task = SurgeryModules(self.test_datasets, projection_dim, hidden_dim, seed=seed)

    def compute_features(self, x: Any) -> Tensor:
        """The model's features, before any surgery."""
        return self.encode(self.model, x)

    def forward(self, x: Any, dataset_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """(features after surgery, the correction that was subtracted, features before), each (B, projection_dim)."""
        if dataset_name not in self.test_datasets:
            raise ConfigError(unknown_name("dataset", dataset_name, self.test_datasets))
        before, index = self.compute_features(x), self.test_datasets.index(dataset_name)
        after = self.modules_by_task(before[:, None], slice(index, index + 1))[:, 0]
        return after, before - after, before
