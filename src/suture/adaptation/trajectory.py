"""The state of the loop, saved so that it can resume with bit-identical results."""

from collections.abc import Sequence

import torch
from torch import Tensor

from suture.storage.resume import Resume


class Trajectory:
    """The coefficients before each step and after the last, and the losses; saved and restored through `resume`.

    `others`: what the optimizer changes beside the coefficients, of which only the last state is kept.
    """

    def __init__(
        self,
        values: Tensor,
        optimizer: torch.optim.Optimizer,
        resume: Resume | None = None,
        others: Sequence[Tensor] = (),
    ):
        self.values, self.optimizer, self.others = values, optimizer, list(others)
        self.resume = resume
        self.history, self.losses = [values.detach().clone()], list[float]()
        state = resume.load() if resume else None
        if state is not None:
            self._restore(state)

    @property
    def step(self) -> int:
        """The number of steps done."""
        return len(self.losses)

    def advance(self, loss: float, *, last: bool = False) -> None:
        """Record one more step; save if it is the last, or if `resume` says that a save is due."""
        self.history.append(self.values.detach().clone())
        self.losses.append(loss)
        if self.resume is not None and (last or self.resume.due()):
            self.resume.save(self._state())

    def _state(self) -> dict:
        return {
            "history": torch.stack(self.history),
            "losses": list(self.losses),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "others": [tensor.detach() for tensor in self.others],
        }

    @torch.no_grad()
    def _restore(self, state: dict) -> None:
        self.history, self.losses = list(state["history"]), list(state["losses"])
        self.values.copy_(self.history[-1])
        for tensor, value in zip(self.others, state.get("others", ()), strict=True):
            tensor.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
