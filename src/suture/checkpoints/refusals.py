"""One-line refusals; whatever a file says about itself is made printable and short before it is repeated."""

from suture.errors import CheckpointError, OutputError

_LONGEST = 300


def shown(text: object) -> str:
    """Text of unknown origin as one printable line of bounded length."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)[: _LONGEST + 1])
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "…"


def refusal(where: object, problem: str, remedy: str) -> CheckpointError:
    """The error for a checkpoint that cannot be read: which one, what was found, what to do."""
    return CheckpointError(f"'{shown(where)}' {shown(problem)}. Remedy: {remedy}.")


def output_refusal(where: object, problem: str, remedy: str) -> OutputError:
    """The error for a result that cannot be written: which one, why, what to do."""
    return OutputError(f"'{shown(where)}' {shown(problem)}. Remedy: {remedy}.")


def short(dtype: object) -> str:
    """A dtype's name as people write it: float32."""
    return str(dtype).removeprefix("torch.")
