"""Frozen copies of the experts of a problem, which share the memory of their weights."""

import copy
from threading import RLock

from torch import nn

from suture.adaptation.blocks import frozen_copy
from suture.errors import IncompatibleModels
from suture.repairs.problem import Problem


class ExpertCopies:
    """Task → a frozen copy of its expert, which shares its memory; loaded anew where tasks share one module.

    The weights are unread if the problem has such experts.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self._copies: dict[int, tuple[nn.Module, nn.Module]] = {}
        self._of: dict[str, int] = {}
        self._lock = RLock()

    def apart(self, task: str) -> nn.Module:
        """A copy of a task's expert that stays as it is while other threads ask for others."""
        with self._lock:
            loads = self.problem.unread is None and callable(self.problem.experts)
            return copy.deepcopy(self[task]) if loads else self[task]

    def __getitem__(self, task: str) -> nn.Module:
        with self._lock:
            return self._found(task)

    def _found(self, task: str) -> nn.Module:
        shared = len(set(self._of.values())) < len(self._of) or len(self._of) < len(self.problem.tasks)
        if task in self._of and not shared:
            return self._copies[self._of[task]][1]
        module = self.problem.unread(task) if self.problem.unread else self.problem.expert(task)
        if id(module) not in self._copies:
            self._copies[id(module)] = (module, frozen_copy(module))
        if (before := self._of.get(task)) not in (None, id(module)) and list(self._of.values()).count(before) == 1:
            del self._copies[before]
        self._of[task] = id(module)
        copied = self._copies[id(module)][1]
        _check(self.problem.module, copied, task)
        return copied


def _check(module: nn.Module, expert: nn.Module, task: str) -> None:
    """Raise `IncompatibleModels` for an expert without a tensor of the merged module."""
    own, theirs = module.state_dict(), expert.state_dict()
    for name, tensor in own.items():
        if name not in theirs or theirs[name].shape != tensor.shape:
            found = f"has shape {tuple(theirs[name].shape)}" if name in theirs else "is missing"
            raise IncompatibleModels(
                f"'{name}' {found} in the expert of task {task!r}; the merged module has {tuple(tensor.shape)}. "
                "Remedy: give experts of the merged module's architecture."
            )
