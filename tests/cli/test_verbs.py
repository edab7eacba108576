"""Laws of the table of verbs: whatever it declares is parsed, explained and completed."""

import re
from importlib.resources import files

import pytest

from suture.cli.completion import names_by_context
from suture.cli.grammar import EVERYWHERE, VERSION, parse
from suture.cli.main import main
from suture.cli.verbs import SHELLS, VERBS
from suture.errors import ConfigError
from suture.pipeline.methods import all_methods
from suture.pipeline.repairs import Repair
from suture.repairs import get_repair_kind, repair_kinds

OPTIONS = [(verb, option) for verb in VERBS.values() for option in verb.options]
KEYS = [(verb, key) for verb in VERBS.values() for key in verb.all_keys]
IDS = {"ids": lambda item: item.name}


def needed(verb):
    """The arguments without which a verb is refused."""
    return [next(iter(argument.values()), "x") for argument in verb.arguments if argument.required]


def printed(capsys, *words):
    assert main(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS.values(), **IDS)
def test_help_has_every_argument_key_and_option_with_an_example(verb, capsys):
    page = printed(capsys, "help", verb.name)
    if verb.name == "help":
        assert all(f"\n  {name} " in page for name in VERBS)
        return
    assert page.startswith(f"Usage: suture {verb.name}")
    assert f"\n{verb.summary}." in page
    assert page.endswith(f"Example:\n  {verb.example}\n")
    names = [argument.name for argument in verb.arguments]
    names += [f"{key.name}=" for key in verb.all_keys if key.name not in verb.unused]
    names += [", ".join(option.names) for option in (*verb.options, *EVERYWHERE)]
    assert [name for name in names if f"\n  {name}" not in page] == []
    assert [name for name in verb.unused if f"\n  {name}" in page] == []
    assert {printed(capsys, verb.name, "--help"), printed(capsys, "-h", verb.name)} == {page}


@pytest.mark.parametrize("kind", repair_kinds())
def test_a_repair_is_explained_like_a_method_with_all_of_its_keys(kind, capsys):
    page = printed(capsys, "methods", kind)
    assert page.startswith(f"repair={kind}\n")
    assert get_repair_kind(kind).paper in page
    defaults = {key: value for key, value in Repair.defaults(kind).items() if key != "kind"}
    shown = dict(re.findall(r"^  repair\.(\w+)=(\S+)", page, re.M))
    assert list(shown) == list(defaults)
    assert {key: shown[key] for key in ("num_inputs", "split")} == {"num_inputs": "null", "split": "test"}
    listed = printed(capsys, "methods").partition("as repair=NAME:")[2]
    assert re.search(rf"^  {kind} +{re.escape(page.splitlines()[2])}$", listed, re.M)
    assert kind in printed(capsys, "help", "run")


def test_every_help_is_as_wide_as_a_terminal_and_the_first_is_one_screen(capsys):
    assert len(printed(capsys).splitlines()) <= 24
    for verb in VERBS:
        assert max(map(len, printed(capsys, "help", verb).splitlines())) <= 80, verb


def test_the_help_of_a_verb_shows_the_defaults_that_the_code_has(capsys):
    from suture.pipeline.config import compose

    config = compose(["method=simple_average", "modelpool=glyphs8"])
    page = printed(capsys, "help", "run")
    for key in ("seed", "threads", "batch_size"):
        assert f"  {key}={config[key]} " in page
    assert f"  fabric.precision={config['fabric']['precision']} " in page
    assert "  threshold=20.0 " in printed(capsys, "help", "analyse")


@pytest.mark.parametrize(("verb", "key"), KEYS, **IDS)
def test_every_key_is_explained_and_parsed(verb, key):
    assert key.help
    request = parse(VERBS, [verb.name, *needed(verb), f"{key.name}=value"])
    own = {own.name for own in verb.own_keys}
    assert request.values.get(key.name) == ("value" if key.name in own else None)
    assert list(request.words) == ([] if key.name in own else [f"{key.name}=value"])


@pytest.mark.parametrize(("verb", "option"), OPTIONS, **IDS)
def test_every_option_is_parsed_wherever_it_stands(verb, option):
    value = option.values[0] if option.values else "2/4" if option.metavar else True
    for name in option.names:
        typed = [name] if value is True else [name, value]
        for words in ([*typed, *needed(verb)], [*needed(verb), *typed]):
            request = parse(VERBS, [verb.name, *words])
            assert request.values[option.name] == value
            setting = f"{option.key}={'true' if value is True else value}"
            assert list(request.words) == ([setting] if option.key else [])


@pytest.mark.parametrize("verb", VERBS.values(), **IDS)
def test_options_of_every_verb_stand_before_and_behind_it(verb):
    for option in EVERYWHERE:
        for name in option.names:
            for words in ([name, verb.name, *needed(verb)], [verb.name, *needed(verb), name]):
                assert option.name in parse(VERBS, words).everywhere


def test_the_word_run_may_be_left_out():
    words = ["method=dare", "-m", "output=out"]
    assert parse(VERBS, words) == parse(VERBS, ["run", *words])
    assert parse(VERBS, ["--json", *words]) == parse(VERBS, ["--json", "run", *words])
    assert parse(VERBS, ["-m", *words[:1]]).verb is VERBS["run"]


@pytest.mark.parametrize("verb", VERBS.values(), **IDS)
def test_completion_offers_exactly_what_the_table_has(verb):
    offered = names_by_context(VERBS)[verb.name]
    options = [name for option in (*verb.options, *EVERYWHERE) for name in option.names]
    keys = ["models." if key.name == "models.NAME" else f"{key.name}=" for key in verb.all_keys]
    values = [value for argument in verb.arguments for value in argument.values()]
    assert sorted(offered) == sorted({*options, *keys, *values})
    start = names_by_context(VERBS)[""]
    assert set(start) == {*VERBS, *VERSION.names, *names_by_context(VERBS)["run"]}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_templates_of_the_scripts_name_nothing_that_the_table_has(shell):
    template = (files("suture.cli") / "shells" / f"suture.{shell}").read_text("utf-8")
    names = {name for _, option in OPTIONS for name in option.names if name.startswith("--")}
    names |= {f"{key.name}=" for _, key in KEYS if not key.group} | {*VERBS} - {"run", "completion"}
    typed = set(re.findall(r"[\w.-]+=?", re.sub(r"#.*", "", template)))
    assert names & typed <= {"help"}


@pytest.mark.parametrize("verb", VERBS.values(), **IDS)
def test_a_typo_is_answered_with_the_nearest_name(verb):
    names = [option.name for option in verb.options]
    names += [key.name for key in verb.all_keys if "." not in key.name]
    for name in names:
        typed = name[:-2] + name[-1] if name.startswith("--") else f"{name[:-2]}{name[-1]}=x"
        with pytest.raises(ConfigError, match=f"Did you mean .*'{name}'"):
            parse(VERBS, [verb.name, *needed(verb), typed])
    with pytest.raises(ConfigError, match=f"Did you mean .*'{verb.name}'"):
        parse(VERBS, [verb.name[:-2] + verb.name[-1]])


def test_no_explanation_is_written_twice():
    for verb in VERBS.values():
        explanations = [named.help for named in (*verb.arguments, *verb.all_keys, *verb.options) if named.help]
        assert len(set(explanations)) == len(explanations)


def test_methods_and_repairs_are_listed_in_a_line_each_under_what_they_need(capsys):
    groups = [group.splitlines() for group in printed(capsys, "methods").split("\n\n")]
    listed = [[re.match(r"  (\S+)  +\S", line)[1] for line in group[1:]] for group in groups[:-1]]
    learned = sorted(name for name, method in all_methods().items() if getattr(method, "inputs", False))
    assert listed == [sorted({*all_methods()} - {*learned}), learned, sorted(repair_kinds())]
    assert [group[0].partition(" as ")[2] for group in groups[:-1]] == ["method=NAME:", "method=NAME:", "repair=NAME:"]


def test_every_knob_of_every_method_and_repair_is_printed_when_asked_for(capsys):
    page = printed(capsys, "methods", "--all")
    blocks = {block[0]: block for block in map(str.splitlines, re.split(r"\n(?=\S)", page))}
    ties = next(block for first, block in blocks.items() if first.startswith("ties_merging"))
    assert "    method.threshold=20.0" in ties
    final = next(block for first, block in blocks.items() if first.startswith("repair=final"))
    assert "    repair.rank=16" in final
    assert main(["methods", "ties_merging", "--all"]) == 2


def test_a_method_is_explained_with_the_ranges_of_its_knobs(capsys):
    page = printed(capsys, "methods", "ties_merging")
    assert "method.threshold=20.0    " in page
    assert "number greater than 0 and at most 100" in page
    assert "sum, mean or max" in page
    assert page.endswith("https://arxiv.org/abs/2306.01708\n")
    assert "All floating-point tensors are merged alike" in page
    matrices = printed(capsys, "methods", "tsv_m")
    assert "each expert of a stack" in " ".join(matrices.split())
    assert max(map(len, matrices.splitlines())) <= 120
    assert printed(capsys, "methods", "lw_adamerging").startswith("adamerging (also layer_wise_adamerging")
