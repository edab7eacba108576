"""manuals: a small Llama that has read English manual pages, and six experts: five languages and Python code.

The texts are those of Debian's packages manpages, manpages-dev and manpages-de, -fr, -es, -it and -pl (and their -dev
companions), and the sources of Python's standard library. The pages of the Linux man-pages project are under several
free licences, mostly GPL-2+ and Linux-man-pages-copyleft, their translations by manpages-l10n under GPL-3+, and the
library under the PSF licence; the zoo is built from them where it is used, and none of them is shipped.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suture.core.progress import bar
from suture.core.random import generator_for
from tools.zoo.manual_pages import CODE, ENGLISH, FOLDER, LANGUAGES, texts

EXPERTS = (*LANGUAGES, CODE)
_SENTENCE = re.compile(r"(?<=[.!?:;,\n] )[^.!?:;\n]{50,110}[.!?:;,\n]")
_BEFORE = (150, 300)  # the least and the most characters before a sentence


@dataclass(frozen=True)
class LanguageRecipe:
    """The size of the Llama, and the length of its training: by default under 30 minutes on two free cores."""

    width: int = 256
    layers: int = 6
    mlp: int = 640
    heads: int = 4
    vocabulary: int = 4096
    context: int = 256

    pretraining_steps: int = 480
    pretraining_rate: float = 3e-3
    finetuning_steps: int = 60
    finetuning_rate: float = 1e-3
    batch: int = 8

    characters: int = 1_500_000
    tokenizer_characters: int = 400_000
    train_texts: int = 1024
    test_texts: int = 24
    quizzes: int = 64
    longest: int = 1200


SMALL = LanguageRecipe(
    width=128, layers=4, mlp=384, vocabulary=2048, context=128, pretraining_steps=600, finetuning_steps=100, longest=800
)
MINIATURE = LanguageRecipe(
    width=32, layers=2, mlp=64, heads=2, vocabulary=400, context=128, pretraining_steps=3, finetuning_steps=2, batch=2,
    characters=20_000, tokenizer_characters=4_000, train_texts=64, test_texts=4, quizzes=6, longest=500,
)  # fmt: skip
_SIZES = {"full": LanguageRecipe(), "small": SMALL, "miniature": MINIATURE}


def build(
    folder: Path, *, seed: int, recipe: LanguageRecipe | None = None, data: Path | None = None, size: str = "full"
) -> None:
    """Train manuals into `folder`: `pretrained`, `experts/NAME`, `data/NAME` and `quiz/NAME`.

    `data` is a folder of manual pages, by default /usr/share/man. Raises `DataError` where pages are missing.
    """
    recipe, data = recipe or _SIZES[size], data or FOLDER
    learned = {name: list(_some(data, name, recipe)) for name in (ENGLISH, *EXPERTS)}
    tokenizer = _tokenizer(learned, recipe)
    tokenizer.save_pretrained(folder / "pretrained")
    for name in learned:
        _save_tasks(folder, data, name, learned[name], tokenizer, recipe, seed)
    model = _new_model(len(tokenizer), recipe, seed)
    _train(model, tokenizer, learned[ENGLISH], recipe, recipe.pretraining_steps, recipe.pretraining_rate, seed, ENGLISH)
    model.save_pretrained(folder / "pretrained")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in EXPERTS:
        model.load_state_dict(start)
        _train(model, tokenizer, learned[name], recipe, recipe.finetuning_steps, recipe.finetuning_rate, seed, name)
        model.save_pretrained(folder / "experts" / name)
        tokenizer.save_pretrained(folder / "experts" / name)


def _some(data: Path, name: str, recipe: LanguageRecipe) -> Iterator[str]:
    """Texts to learn from, of about so many characters, spread over all pages."""
    everything = list(texts(data, name, held_out=False, longest=recipe.longest))
    order = torch.randperm(len(everything), generator=generator_for(0, f"{name}/texts")).tolist()
    left = recipe.characters
    for index in order:
        if left <= 0:
            return
        left -= len(everything[index])
        yield everything[index]


def _save_tasks(
    folder: Path, data: Path, name: str, learned: list[str], tokenizer: Any, recipe: LanguageRecipe, seed: int
) -> None:
    """Texts, and questions which of four endings has its words in order, from pages that no model learns from."""
    held_out = list(texts(data, name, held_out=True, longest=recipe.longest))
    order = torch.randperm(len(held_out), generator=generator_for(seed, f"{name}/test")).tolist()
    chosen = [held_out[i] for i in order if len(held_out[i]) > recipe.longest // 3]
    _write(folder / "data" / name / "train.jsonl", ({"text": text} for text in learned[: recipe.train_texts]))
    _write(folder / "data" / name / "test.jsonl", ({"text": text} for text in chosen[: recipe.test_texts]))
    quizzes = list(islice(_quizzes([held_out[i] for i in order], name, seed), 2 * recipe.quizzes))
    for quiz in quizzes:
        quiz["beginning"] = _shortened(quiz["beginning"], quiz["endings"], tokenizer, recipe.context)
    quizzes = [quiz for quiz in quizzes if quiz["beginning"]]
    _write(folder / "quiz" / name / "train.jsonl", quizzes[len(quizzes) // 2 :])
    _write(folder / "quiz" / name / "test.jsonl", quizzes[: len(quizzes) // 2])


def _quizzes(passages: Sequence[str], name: str, seed: int) -> Iterator[dict[str, Any]]:
    """The text before a sentence, and four endings of the same words, of which one is the sentence.

    First the last sentence of each passage, then the one before it, and so on. A sentence, or a part of one, has at
    least six words and at most 110 characters. Its first and last words stay where they are, and at least four
    different ones between them change places.
    """
    generator = generator_for(seed, f"{name}/quiz")
    found = [[match for match in _SENTENCE.finditer(each) if match.start() >= _BEFORE[0]] for each in passages]
    for turn in range(1, 1 + max(map(len, found), default=0)):
        for passage, sentences in zip(passages, found, strict=True):
            if len(sentences) >= turn:
                start, words = sentences[-turn].start(), sentences[-turn][0].split()
                if len(words) >= 6 and len(set(words[1:-1])) >= 4:
                    beginning = passage[max(0, start - _BEFORE[1]) : start].strip()
                    yield {"beginning": beginning, **_endings(words, generator)}


def _endings(words: list[str], generator: torch.Generator) -> dict[str, Any]:
    """A sentence among three others of the same words, and its place."""
    sentence, wrong = " ".join(words), set[str]()
    while len(wrong) < 3:
        order = torch.randperm(len(words) - 2, generator=generator).tolist()
        wrong |= {" ".join([words[0], *(words[1 + i] for i in order), words[-1]])} - {sentence}
    right = int(torch.randint(4, (1,), generator=generator))
    others = sorted(wrong)
    return {"endings": [*others[:right], sentence, *others[right:]], "answer": right}


def _shortened(beginning: str, endings: list[str], tokenizer: Any, context: int) -> str:
    """The end of a beginning, as much of it as fits into the context with the longest ending."""
    longest = max(len(tokens) for tokens in tokenizer([f" {ending}" for ending in endings])["input_ids"])
    while beginning and (excess := len(tokenizer(beginning)["input_ids"]) + longest + 1 - context) > 0:
        beginning = beginning[excess:].lstrip()  # a token has one character or more
    return beginning


def _write(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def _tokenizer(learned: dict[str, list[str]], recipe: LanguageRecipe) -> Any:
    """Byte-level BPE, learned from equal parts of all corpora, so that no expert lacks its letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(("".join(part)[: recipe.tokenizer_characters] for part in learned.values()), trainer)
    facts = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<s>", "model_max_length": recipe.context}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **facts)


def _new_model(vocabulary: int, recipe: LanguageRecipe, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=recipe.width,
            intermediate_size=recipe.mlp,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def _train(
    model: Any,
    tokenizer: Any,
    learned: list[str],
    recipe: LanguageRecipe,
    steps: int,
    rate: float,
    seed: int,
    name: str,
) -> None:
    """AdamW on next tokens, with a linear warm-up and a cosine to zero."""
    stream = _stream(tokenizer, learned)
    generator = generator_for(seed, f"{name}/training")
    adam = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=steps + 1, pct_start=0.1)
    model.train()
    with bar(f"Training on {name}", steps) as advance:
        for _ in range(steps):
            starts = torch.randint(len(stream) - recipe.context, (recipe.batch,), generator=generator)
            rows = torch.stack([stream[start : start + recipe.context] for start in starts.tolist()])
            rows[:, 0] = tokenizer.bos_token_id
            adam.zero_grad()
            model(input_ids=rows, labels=rows).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            schedule.step()
            advance(1)
    model.eval()


def _stream(tokenizer: Any, learned: list[str]) -> Tensor:
    """All texts as one row of tokens, each after the token of a beginning."""
    tokens = tokenizer(learned)["input_ids"]
    return torch.tensor([token for row in tokens for token in (tokenizer.bos_token_id, *row)])
