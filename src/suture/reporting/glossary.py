"""The words of a page, each explained where it stands."""

import re
from collections.abc import Iterable
from functools import cache
from html import escape

from suture.merging.registry import methods
from suture.repairs import repair_kinds

WORDS = {
    "mean": "The unweighted mean over tasks. Below it, the 95% interval: what other test inputs could have given.",
    "norm.": "The mean over tasks of accuracy / accuracy of the task's own fine-tuned model (the expert).",
    "gap closed": "(model − pretrained) / (experts − pretrained), of the means: 0 is the pretrained model, 100 is as "
    "good as all experts.",
    "learned from": "The split of the inputs from which something was learned. Results learned from unlabelled test "
    "inputs (as AdaMerging and Surgery do in their papers) do not compare with those that never saw them.",
    "task's name": "needed: the model must be told which task each input belongs to. routed: a router chooses the task "
    "from the input. –: one model for all inputs, whatever their task.",
    "learned": "What was learned, by how much work, and from how many inputs of each task, without their labels.",
    "added": "Parameters stored beside those of one model, for all tasks together.",
    "seconds": "The time to merge and repair, without evaluation; a loop that an earlier run did counts with its time.",
    "memory": "The largest size of the process in main memory meanwhile, with the libraries and whatever the run held.",
    "experts": "Each fine-tuned model on its own task: one model a task, and the task's name must be known.",
    "pretrained": "The model that all others were fine-tuned from, as it was.",
    "routed": "A router, fitted on unlabelled inputs, chooses the task of each input, so that no name is needed. A "
    "wrong choice counts as a wrong answer.",
    "merged": "The merged model before any repair.",
    "L1": "The mean over inputs and dimensions of |model − expert|: 0 is the expert's representation.",
    "CKA": "Linear centred kernel alignment, from 0 to 1: how alike two representations are up to rotation and scale.",
}
_ADAMERGING = "Coefficients of the task vectors{}, learned from unlabelled inputs. https://arxiv.org/abs/2310.02575"
_TIES = ", which are trimmed and signed as by TIES"
WORDS |= {
    "tw_adamerging": _ADAMERGING.format(", one for each task"),
    "lw_adamerging": _ADAMERGING.format(", one for each task and tensor"),
    "tw_adamergingpp": _ADAMERGING.format(f"{_TIES}, one for each task"),
    "lw_adamergingpp": _ADAMERGING.format(f"{_TIES}, one for each task and tensor"),
}


def explained(word: str, text: str | None = None) -> str:
    """HTML of a word, or of `text` in its place, with its explanation on hover and on focus."""
    about = WORDS.get(word) or _registered().get(word)
    inside = escape(word if text is None else text).replace("_", "_<wbr>")
    return f'<dfn tabindex=0 title="{escape(about)}">{inside}</dfn>' if about else inside


def explained_name(name: str) -> str:
    """HTML of a row's name, such as "ties_merging + final, routed", with every known word explained."""
    parts = re.split(r"( \+ |, )", name)
    return "".join(map(explained, parts))


def list_of(words: Iterable[str]) -> str:
    """HTML of a list of those words that are known, with their explanations: for print, and where nothing hovers."""
    known = {word: WORDS.get(word) or _registered().get(word) for word in words}
    lines = "".join(f"<dt>{escape(word)}</dt><dd>{escape(about)}</dd>" for word, about in known.items() if about)
    return f"<details class=words><summary>What the words mean</summary><dl>{lines}</dl></details>" if lines else ""


@cache
def _registered() -> dict[str, str]:
    """Method or repair → the first sentence of its docstring, with its paper."""
    known = {**methods(), **repair_kinds()}
    return {name: f"{each.knobs.summary} {each.paper}".strip() for name, each in known.items()}
