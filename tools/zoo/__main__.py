"""`python -m tools.zoo build NAME`: train a zoo into a folder, by default where suture looks for it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from suture.errors import SutureError
from tools.zoo.building import build, buildable


def main(argv: Sequence[str] | None = None) -> int:
    """Build one zoo and print its folder; returns the exit code: 0, or 2 after one line for bad input."""
    options = vars(_parser().parse_args(argv))
    options.pop("command")
    name = options.pop("name")
    try:
        folder = build(name, **{option: value for option, value in options.items() if value is not None})
    except SutureError as error:
        print(f"tools.zoo: {error}", file=sys.stderr)
        return 2
    print(f"Built {name} in {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tools.zoo", description="Build the models and data of a zoo.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="train a zoo from data on this machine")
    command.add_argument("name", metavar="NAME", help=f"one of: {', '.join(buildable())}")
    command.add_argument("--output", type=Path, metavar="DIR", help="a new folder; by default in suture's cache")
    command.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same bits (default: 0)")
    command.add_argument("--data", type=Path, metavar="DIR", help="a folder of Fashion-MNIST, or of manual pages")
    command.add_argument("--size", choices=["full", "small", "miniature"], help="the size of manuals (default: full)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
