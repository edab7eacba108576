"""Build the zoos that suture's examples, documentation and tests merge: `python -m tools.zoo build NAME`."""

from tools.zoo.building import build, buildable

__all__ = ["build", "buildable"]
