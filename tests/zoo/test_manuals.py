"""The zoo of manual pages, in a miniature of pages made on the spot."""

import gzip
import json
import random

import pytest

from suture.cli.main import main
from tools.zoo.builders import manuals
from tools.zoo.manual_pages import LANGUAGES

LETTERS = {"": "aeiostrn", "de": "äöüßesti", "fr": "éèàçesto", "es": "ñóíáesto", "it": "àèìùesto", "pl": "łąęśżzio"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The folder of a cache with the zoo in it."""
    pages, cache = tmp_path_factory.mktemp("pages"), tmp_path_factory.mktemp("cache")
    for language in ("", *LANGUAGES.values()):
        draw = random.Random(language)
        (pages / language / "man1").mkdir(parents=True)
        for page in range(40):
            words = ["".join(draw.choices(LETTERS[language], k=draw.randrange(2, 8))) for _ in range(120)]
            with gzip.open(pages / language / "man1" / f"page{page}.1.gz", "wt", encoding="utf-8") as file:
                sentences = (" ".join(words[start : start + 15]) + ". " for start in range(0, 120, 15))
                file.write(".TH PAGE 1\n.SH NAME\n" + "".join(sentences) + "\n.PP\n" + " ".join(reversed(words)))
    manuals.build(cache / "zoo" / "manuals", seed=0, recipe=manuals.MINIATURE, data=pages)
    return cache


def test_questions_fit_into_the_context_with_their_longest_ending(zoo):
    from transformers import AutoTokenizer

    folder = zoo / "zoo" / "manuals"
    tokenizer = AutoTokenizer.from_pretrained(folder / "pretrained")
    for name in (*LANGUAGES, "code"):
        lines = (folder / "quiz" / name / "test.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        sizes = [
            max(len(tokenizer(f"{row['beginning']} {ending}", verbose=False)["input_ids"]) for ending in row["endings"])
            for row in rows
        ]
        assert rows
        assert max(sizes) < manuals.MINIATURE.context
        assert all(row["beginning"] for row in rows)


@pytest.mark.parametrize(
    "taskpool", ["CausalLMTaskPool/manuals", "CausalLMTaskPool/manuals_quiz", "CausalLMTaskPool/manuals_and_quiz"]
)
def test_the_pools_that_ship_fit_the_zoo(zoo, monkeypatch, capsys, taskpool):
    monkeypatch.setenv("SUTURE_CACHE", str(zoo))
    assert main(["check", "method=ties_merging", "modelpool=manuals", f"taskpool={taskpool}"]) == 0
    assert "everything fits" in capsys.readouterr().out
