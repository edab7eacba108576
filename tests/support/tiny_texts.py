"""Text classifiers small enough to be trained on the spot, saved as transformers saves them, and their data."""

import json
import random
from pathlib import Path

import torch

WORDS = "the a cat dog runs sleeps red blue one two is was near far big small".split()  # noqa: SIM905
TASKS = {"colour": ("blue", "red"), "animal": ("cat", "dog"), "number": ("one", "two")}


def save_tokenizer(directory: Path, kind: str = "bert", extra: list[str] | None = None) -> int:
    """A tokenizer of whole words; the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    start, end = ("<s>", "</s>") if kind != "bert" else ("[CLS]", "[SEP]")
    tokens = ["[PAD]", "[UNK]", start, end, *WORDS, *(extra or ())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    single, pair = (f"{start} $A {end}", f"{start} $A {end} $B:1 {end}:1") if kind != "t5" else (f"$A {end}",) * 2
    pair = pair if kind != "t5" else f"$A {end} $B {end}"
    special = [(token, vocabulary[token]) for token in (start, end)]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if kind == "bert" else [])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token=end, model_input_names=inputs
    )
    tokenizer.save_pretrained(directory)
    return len(vocabulary)


def write_task(folder: Path, name: str, kind: str = "jsonl", count: int = 48, seed: int = 0) -> Path:
    """Sentences in two columns, `first` and `second`, labelled by which of the task's two words is in the second."""
    draw = random.Random(f"{name}{seed}")
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = []
        for i in range(count):
            words = draw.sample([w for w in WORDS if w not in TASKS[name]], draw.randint(2, 5))
            words.insert(draw.randint(0, len(words)), TASKS[name][i % 2])
            rows.append({"first": " ".join(draw.sample(WORDS, 2)), "second": " ".join(words), "label": i % 2})
        if kind == "csv":
            lines = ["first,second,label", *(",".join(map(str, row.values())) for row in rows)]
            (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
        else:
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows_of(folder: Path, split: str = "train") -> tuple[list[str], list[str], torch.Tensor]:
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    return [r["first"] for r in rows], [r["second"] for r in rows], torch.tensor([r["label"] for r in rows])


def bert_config(vocabulary: int, **more):
    from transformers import BertConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertConfig(vocab_size=vocabulary, max_position_embeddings=32, **sizes, **more)


def trained(model, tokenizer, folder: Path, steps: int = 30):
    """The model after some steps of Adam on a task's training split."""
    first, second, labels = rows_of(folder)
    batch = tokenizer(first, second, padding=True, return_tensors="pt")
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        adam.zero_grad()
        model(**batch, labels=labels).loss.backward()
        adam.step()
    return model.eval()
