"""The grammar of the command line: `suture VERB key=value … --option`.

The table of verbs (`suture.cli.verbs`) is made of the classes below. The parser, the help and the completion scripts
are all made from it.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Any, NoReturn

from suture.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Argument:
    """A word in a position of its own: `suture push RUN NAME`."""

    name: str
    help: str
    required: bool = True
    many: bool = False
    path: bool = False
    values: Callable[[], Iterable[str]] = tuple


@dataclass(frozen=True)
class Key:
    """A setting typed as `name=value`.

    `default` is shown as it is typed. `path`: the value is a file or a folder. `group`: the value is the name of one of
    several configurations.
    """

    name: str
    help: str
    default: str = ""
    path: bool = False
    group: bool = False
    required: bool = False
    values: Callable[[], Iterable[str]] = tuple


@dataclass(frozen=True)
class Option:
    """A flag, or with a `metavar` an option that takes a value.

    `key`: the setting that it is another spelling of. `text`: with it, a command prints text and has no JSON.
    """

    name: str
    help: str
    metavar: str = ""
    short: str = ""
    key: str = ""
    values: tuple[str, ...] = ()
    text: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The spellings, the short one first."""
        return (self.short, self.name) if self.short else (self.name,)


@dataclass(frozen=True)
class Verb:
    """One command. `run` takes a `Request` and returns the `Answer`, or None where it printed all there is.

    `keys` are the verb's own settings, and `found_keys()` those that parts of the package declare. Where it takes a
    configuration too, `configuration` names its YAML file in suture/pipeline/conf; `forwarded` keys belong to the
    configuration although they are not in the file, and `unused` ones have no effect here. `method` is the method of a
    configuration that does not name one. `defaults()` gives defaults of keys that are not in the file. `text`: the verb
    prints text and has no JSON.
    """

    name: str
    summary: str
    example: str
    run: Callable[["Request"], Any]
    details: str = ""
    arguments: tuple[Argument, ...] = ()
    keys: tuple[Key, ...] = ()
    forwarded: tuple[Key, ...] = ()
    options: tuple[Option, ...] = ()
    configuration: str = ""
    method: str = ""
    unused: tuple[str, ...] = ()
    text: bool = False
    defaults: Callable[[], Mapping[str, Any]] = dict
    found_keys: Callable[[], tuple[Key, ...]] = tuple

    @property
    def own_keys(self) -> tuple[Key, ...]:
        """The verb's own settings, those that are found included."""
        return (*self.keys, *self.found_keys())

    @property
    def all_keys(self) -> tuple[Key, ...]:
        """Every setting that the verb takes: its own, then those of its configuration."""
        configured = configuration_keys(self.configuration) if self.configuration else ()
        return (*self.own_keys, *self.forwarded, *(self._with_method(key) for key in configured))

    def _with_method(self, key: Key) -> Key:
        return replace(key, default=self.method, required=False) if self.method and key.name == "method" else key

    @property
    def usage(self) -> str:
        """The verb's usage, in one line."""
        words = [f"suture {self.name}"]
        for argument in self.arguments:
            name = f"{argument.name} …" if argument.many else argument.name
            words.append(name if argument.required else f"[{name}]")
        if self.configuration:
            words.append("key=value …")
        words += [f"[{option.name}{' ' * bool(option.metavar)}{option.metavar}]" for option in self.options]
        return " ".join(words)


@dataclass(frozen=True)
class Request:
    """A command line, taken apart: the verb, its own values by name, the words of the configuration, and all verbs."""

    verb: Verb
    values: Mapping[str, Any] = field(default_factory=dict)
    words: Sequence[str] = ()
    everywhere: frozenset[str] = frozenset()
    verbs: Mapping[str, Verb] = field(default_factory=dict)


EVERYWHERE = (
    Option("--json", "print one JSON document instead of tables"),
    Option("--quiet", "print only the result: a folder, a page, names", short="-q"),
    Option("--verbose", "say on standard error what is read, and how long each stage took", short="-v"),
    Option("--traceback", "after an error, show where it came from"),
    Option("--help", "show this help", short="-h", text=True),
)
VERSION = Option("--version", "show the version", short="-V")


class Parser(argparse.ArgumentParser):
    """argparse's parser, with errors of one line raised as `ConfigError`."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, add_help=False, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving the process."""
        match = re.fullmatch(r"argument (?:\S+/)?(\S+): (.*)", message)
        name, problem = match.groups() if match else ("", message)
        problem = "wants a value" if "expected one argument" in problem else problem
        problem = "takes no value" if "explicit argument" in problem else problem
        raise ConfigError(f"{name} {problem}.".strip())


def parse(verbs: Mapping[str, Verb], arguments: Sequence[str], implied: str = "run") -> Request:
    """Take a command line apart. Without a verb it is that of the verb `implied`, if it has any word of a verb's.

    Raises `ConfigError` for an unknown verb, key or option, with the nearest names.
    """
    parser = _parser(verbs)
    namespace, extra = parser.parse_known_args(_with_verb(verbs, arguments, implied))
    parsed = vars(namespace)
    verb = verbs[parsed["verb"] or "help"]
    for word in extra:
        if word.startswith("-"):
            raise ConfigError(unknown_name(f"option of suture {verb.name}", word.partition("=")[0], _names(verb)))
    everywhere = frozenset(option.name for option in (*EVERYWHERE, VERSION) if parsed.get(_field(option)))
    if everywhere & {"--help", "--version"}:
        return Request(verb if parsed["verb"] else verbs["help"], everywhere=everywhere, verbs=verbs)
    values, words = _sorted_out(verb, [*parsed.get("words", ()), *extra])
    for option in verb.options:
        value = parsed.get(_field(option))
        if option.values and value is not None and value not in option.values:
            raise ConfigError(unknown_name(f"value of {option.name}", value, option.values))
        if option.key and value:
            words.append(f"{option.key}={'true' if value is True else value}")
        values[option.name] = value
    return Request(verb, values, words, everywhere, verbs)


def _with_verb(verbs: Mapping[str, Verb], arguments: Sequence[str], implied: str) -> list[str]:
    """The words with a verb among them, if there is anything but options that go with every verb."""
    general = {name for option in (*EVERYWHERE, VERSION) for name in option.names}
    for i, word in enumerate(arguments):
        if word in general:
            continue
        if word in verbs:
            return list(arguments)
        if "=" in word or word.startswith(("-", "~")):
            return [*arguments[:i], implied, *arguments[i:]]
        raise ConfigError(unknown_name("command", word, [*verbs, "method=…"]))
    return list(arguments)


def _parser(verbs: Mapping[str, Verb]) -> Parser:
    parser = Parser("suture")
    for option in (*EVERYWHERE, VERSION):
        _add(parser, option)
    commands = parser.add_subparsers(dest="verb", parser_class=Parser)
    for verb in verbs.values():
        command = commands.add_parser(verb.name)
        command.add_argument("words", nargs="*")
        for option in (*verb.options, *EVERYWHERE):
            _add(command, option)
    return parser


def _add(parser: Parser, option: Option) -> None:
    """Options that go with every verb may stand before or after it: neither default hides the other."""
    action = "store" if option.metavar else "store_true"
    parser.add_argument(*option.names, dest=_field(option), default=argparse.SUPPRESS, action=action)


def _field(option: Option) -> str:
    return option.name.removeprefix("--")


def _names(verb: Verb) -> list[str]:
    return [option.name for option in (*verb.options, *EVERYWHERE)]


def _sorted_out(verb: Verb, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The verb's own values by name, and the words that are left for the configuration."""
    if not verb.configuration:
        return _by_position(verb, words), []
    own, known = {key.name for key in verb.own_keys}, {_root(key.name) for key in verb.all_keys} | {"hydra"}
    known |= {"surgery"} if "repair" in known else set()  # what the group is often called
    values: dict[str, Any] = {}
    bare, configured = [], []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            bare.append(word)
        elif key in own:
            values[key] = value
        elif _root(key.lstrip("+~")) not in known:
            raise ConfigError(unknown_name("key", key.lstrip("+~"), [key.name for key in verb.all_keys]))
        else:
            configured.append(word)
    return values | _by_position(verb, bare), configured


def _root(key: str) -> str:
    return re.split(r"[./]", key, maxsplit=1)[0]


def _by_position(verb: Verb, words: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    left = list(words)
    for argument in verb.arguments:
        taken = left if argument.many else left[:1]
        left = left[len(taken) :]
        known = list(argument.values())
        if argument.required and not taken:
            one_of = f", one of {', '.join(known)}" if known else ""
            raise ConfigError(f"{argument.name} is missing: {argument.help}{one_of}. Usage: {verb.usage}")
        for word in taken:
            if known and word not in known:
                raise ConfigError(unknown_name(argument.name.lower(), word, known))
        values[argument.name] = taken if argument.many else next(iter(taken), None)
    if left:
        raise ConfigError(f"Unexpected argument {left[0]!r}. Usage: {verb.usage}")
    return values


def true_or_false() -> tuple[str, ...]:
    """The values of a switch."""
    return ("true", "false")


_LINE = re.compile(r"(?P<indent> *)(?:- )?(?P<key>\w+): *(?P<default>[^#]*?) *(?:# *(?P<help>.*))?")
_PATHS = {"modelpool", "taskpool", "output"}
_LEFT_OPEN = {"null", "???"}


@cache
def configuration_keys(name: str) -> tuple[Key, ...]:
    """The keys of suture/pipeline/conf/NAME.yaml, each with its default and the comment beside it."""
    text = (files("suture") / "pipeline" / "conf" / f"{name}.yaml").read_text("utf-8")
    keys, sections = [], [""]
    for match in filter(None, map(_LINE.fullmatch, text.splitlines())):
        depth = len(match["indent"]) // 2
        sections[depth + 1 :] = [match["key"]]
        path = [section for section in sections[1:] if section != "defaults"]
        if path and path[0] != "hydra" and (match["default"] or match["key"] in _PATHS):
            default = "" if match["default"] in _LEFT_OPEN else match["default"]
            key = Key(".".join(path), match["help"] or "", default, match["key"] in _PATHS, "defaults" in sections)
            values = true_or_false if default in true_or_false() else tuple
            keys.append(replace(key, required=match["default"] == "???", values=values))
    return tuple(keys)


@cache
def shipped_pools(group: str) -> tuple[str, ...]:
    """The pools of suture/pipeline/conf by name, without their folder: `modelpool` or `taskpool`."""
    folders = (files("suture") / "pipeline" / "conf" / group).iterdir()
    names = (PurePath(file.name) for folder in folders if folder.is_dir() for file in folder.iterdir())
    return tuple(dict.fromkeys(sorted(name.stem for name in names if name.suffix == ".yaml")))
