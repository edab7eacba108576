"""How far the loop has come: what has to be kept so that it can go on from there to the same bits."""

import torch
from torch import Tensor

from suture.storage.resume import Resume


class Trajectory:
    """Steps done, the coefficients before each and after the last, and the losses; saved and taken up by `resume`."""

    def __init__(self, values: Tensor, optimizer: torch.optim.Optimizer, resume: Resume | None = None):
        self.values, self.optimizer, self.resume = values, optimizer, resume
        self.history, self.losses = [values.detach().clone()], list[float]()
        state = resume.load() if resume else None
        if state is not None:
            self._take_up(state)

    @property
    def step(self) -> int:
        """How many steps have been done."""
        return len(self.losses)

    def advance(self, loss: float, *, last: bool = False) -> None:
        """Note one more step; save after the last one, and when it is time."""
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
        }

    @torch.no_grad()
    def _take_up(self, state: dict) -> None:
        self.history, self.losses = list(state["history"]), list(state["losses"])
        self.values.copy_(self.history[-1])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
