"""The command line. It adds no feature: every verb is one call that Python has too."""

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import TYPE_CHECKING

from suture.errors import SutureError

if TYPE_CHECKING:
    from suture.cli.grammar import Request
    from suture.cli.output import Answer, Manner

STOPPED, CLOSED = 130, 141  # as a shell reports SIGINT and SIGPIPE
_LONGEST_WORD = 200
_SPINS = "30000"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; `argv` is by default the process's own.

    0: done. 1: a figure disagrees, or an error of suture's own. 2: bad input. 130: interrupted. 141: standard output
    was closed. Every error is one line on standard error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _wait_briefly()
    interrupts: list[int] = []
    try:
        with _noting_interrupts(interrupts, until_exit=argv is None):
            code = _run(arguments)
            print(end="", flush=True)
            return code
    except BaseException as error:
        if "--traceback" in arguments:
            import traceback

            traceback.print_exc()
        # An import that is interrupted may raise another exception.
        return _code_and_line(KeyboardInterrupt() if interrupts else error)


def _wait_briefly() -> None:
    """Let threads of OpenMP that wait for each other give way sooner, unless the user has chosen.

    By default they spin ten times as often: where other work has the cores, small models then take longer.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def _run(arguments: list[str]) -> int:
    from suture.cli.grammar import parse
    from suture.cli.output import Manner, aloud
    from suture.cli.verbs import VERBS

    _check_text(arguments)
    request = parse(VERBS, arguments)
    manner = Manner.of(request)
    with aloud() if "--verbose" in request.everywhere else nullcontext(), manner.while_working():
        answer = _answer(request, manner)
    if answer is None:
        return 0
    manner.tell(answer)
    return answer.code


def _answer(request: "Request", manner: "Manner") -> "Answer | None":
    from suture.cli import actions

    manner.check(request)
    if "--version" in request.everywhere:
        return actions.version()
    if "--help" in request.everywhere:
        return actions.explain(request)
    return request.verb.run(request)


def _check_text(arguments: Sequence[str]) -> None:
    """Refuse bytes that are no text: they can be neither printed nor stored in a report."""
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            text = os.fsencode(argument).decode("utf-8", "replace")
            raise SutureError(f"The argument '{text}' is not valid UTF-8. Remedy: rename the file or folder.") from None


@contextmanager
def _noting_interrupts(interrupts: list[int], until_exit: bool) -> Iterator[None]:
    """Note every Ctrl-C before it becomes a KeyboardInterrupt, so that no library can turn it into another error."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        # While the interpreter ends there is nothing left to tidy up, and a KeyboardInterrupt would print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL if until_exit else before)


def _code_and_line(error: BaseException) -> int:
    """Print one line about an error, and return the exit code."""
    if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):  # rich raises SystemExit
        _discard_output()
        return CLOSED
    if isinstance(error, KeyboardInterrupt):
        code, line = STOPPED, "stopped."
    elif isinstance(error, SutureError):
        code, line = 2, str(error)
    elif isinstance(error, OSError):
        if not error.filename:
            _discard_output()
        where = f"'{error.filename}'" if error.filename else "The output"
        code, line = 2, f"{where} cannot be read or written: {error.strerror or error}."
    elif isinstance(error, Exception):
        hint = "This is a bug in suture; please report it with what --traceback prints"
        code, line = 1, f"{type(error).__name__}: {error}. {hint}."
    else:
        return 2 if isinstance(error, SystemExit) and error.code else 0  # hydra has printed its line
    with suppress(OSError):
        print(f"suture: {_one_line(line)}", file=sys.stderr)
    return code


def _one_line(text: str) -> str:
    """Printable text on one line, in which no word is too long to read."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return re.sub(rf"(\S{{{_LONGEST_WORD}}})\S+", r"\1…", line)


def _discard_output() -> None:
    """Let the interpreter flush to nowhere the bytes that standard output could not take."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


if __name__ == "__main__":
    sys.exit(main())
