"""The help: one screen of all verbs, and one page for each, made from the table of verbs."""

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping

from suture.cli.catalogue import catalogue
from suture.cli.grammar import EVERYWHERE, VERSION, Argument, Key, Option, Verb, true_or_false

_WIDTH = 80
_COLUMN = 28  # where explanations begin on a verb's page
_KNOBS = {
    "": [],
    "merging": [("method.KNOB=…", "a knob of the method; `suture methods METHOD` explains them")],
    "config": [
        ("method.KNOB=…", "a knob of the method; `suture methods METHOD` explains them"),
        ("repair.KNOB=…", "a knob of the repair; `suture methods REPAIR` explains them"),
        ("method.NAME.KNOB=…", "a knob of one method of a sweep; repair.KIND.KNOB=… of one kind of repair"),
    ],
}  # configuration → keys that its file does not list
_NO_BREAK = "\N{NO-BREAK SPACE}"

_TITLE = "suture merges fine-tuned models into one, then closes the representation gap."


def overview(verbs: Mapping[str, Verb]) -> str:
    """All verbs on one screen."""
    everywhere = ", ".join(" ".join(option.names) for option in (*EVERYWHERE, VERSION))
    example = verbs["run"].example.replace("suture run", "suture")
    lines = [_TITLE, "Usage: suture VERB [key=value …] [--option …]", f"       {example}", ""]
    lines += [line for verb in verbs.values() for line in _entry(f"  {verb.name}", verb.summary, 14)]
    lines += ["", "`suture VERB --help` explains a verb. The word run may be left out.", f"Always: {everywhere}"]
    return "\n".join(lines)


def page(verb: Verb) -> str:
    """Usage, arguments, keys with their defaults, options and an example of one verb."""
    details = [line for part in verb.details.split("\n\n") if part for line in ("", *_paragraph(part))]
    knobs = [knob for knob in _KNOBS[verb.configuration] if knob[0].partition(".")[0] not in verb.unused]
    arguments = ((argument.name, _with_values(argument)) for argument in verb.arguments)
    keys = [_key(key, verb.defaults()) for key in verb.all_keys if key.name not in verb.unused] + knobs
    return "\n".join(
        [
            *_wrapped("Usage: ", verb.usage),
            *("", f"{verb.summary}.", *details),
            *_section("Arguments", arguments),
            *_section("Keys", keys),
            *_section("Options", map(_option, (*verb.options, *EVERYWHERE))),
            *("", "Example:", f"  {verb.example}"),
        ]
    )


def _key(key: Key, defaults: Mapping[str, object]) -> tuple[str, str]:
    default = str(defaults.get(key.name, key.default))
    return f"{key.name}={default or '…'}", _with_values(key) + " (required)" * key.required


def _with_values(named: Argument | Key) -> str:
    """The explanation, and the values that can be given where there is a list of them."""
    values = ", ".join(catalogue().repairs if named.name == "repair" else named.values())
    return f"{named.help} ({values})" if values and named.values is not true_or_false else named.help


def _option(option: Option) -> tuple[str, str]:
    same = f"the same as {option.key}={option.metavar or 'true'}"
    return f"{', '.join(option.names)} {option.metavar}".rstrip(), option.help or same


def _section(title: str, entries: Iterable[tuple[str, str]]) -> list[str]:
    lines = [line for name, explanation in entries for line in _entry(f"  {name}", explanation, _COLUMN)]
    return ["", f"{title}:", *lines] if lines else []


def _entry(name: str, explanation: str, column: int) -> Iterator[str]:
    """A name and, from a column on, what it means; a name that reaches too far has a line of its own."""
    if len(name) > column - 2:
        yield name
        name = ""
    text = textwrap.wrap(explanation, _WIDTH - column) or [""]
    yield f"{name:<{column}}{text[0]}".rstrip()
    yield from (" " * column + line for line in text[1:])


def _wrapped(label: str, text: str) -> list[str]:
    """Lines of text after a label; what is in brackets stays together."""
    joined = re.sub(r"\[[^]]*\]", lambda match: match[0].replace(" ", _NO_BREAK), label + text)
    indent = " " * len(label)
    lines = textwrap.wrap(joined, _WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
    return [line.replace(_NO_BREAK, " ") for line in lines]


def _paragraph(text: str) -> list[str]:
    """Running text is wrapped; lines that begin with a space stay as they are."""
    return text.splitlines() if text.startswith(" ") else _wrapped("", " ".join(text.split()))
