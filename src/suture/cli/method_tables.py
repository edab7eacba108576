"""The methods and their knobs, for people at a terminal."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console

from suture.cli.catalogue import MethodEntry


def print_methods(methods: Iterable[MethodEntry], repairs: Iterable[str]) -> None:
    """Every method with its knobs, defaults, aliases and paper; then the names of repairs."""
    console = Console(soft_wrap=True, highlight=False)
    for method in methods:
        console.print(f"{_named(method)}: {method.summary}")
        for name, knob in method.knobs.items():
            console.print(f"    method.{name}={_typed(knob.default)}", markup=False)
        console.print(f"    {method.paper}")
    console.print(
        f"\nRepairs, as repair=NAME: {', '.join(repairs)}.", "`suture methods NAME` explains one of either kind."
    )


def print_method(method: MethodEntry) -> None:
    """One method or repair: what it does, each knob with its default and range, and its paper."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(_named(method))
    console.print(f"\n{method.description}\n", markup=False)
    knobs = {f"{method.group}.{name}={_typed(knob.default)}": knob.range for name, knob in method.knobs.items()}
    width = min(38, max(map(len, knobs), default=0))
    for typed, allowed in knobs.items():
        console.print(f"  {typed:<{width}}  {allowed}", markup=False)
    console.print(f"\n{method.paper}" if knobs else f"It has no knobs.\n\n{method.paper}")


def _named(method: MethodEntry) -> str:
    aliases = f" (also {', '.join(method.aliases)})" if method.aliases else ""
    group = "" if method.group == "method" else f"{method.group}="
    return f"[bold]{group}{method.name}[/bold]{aliases}"


def _typed(default: Any) -> str:
    """A default as it is typed on the command line."""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(list(default)) if isinstance(default, tuple) else str(default)
