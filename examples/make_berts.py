"""A small BERT, two fine-tunes of it and their data, made on the spot: python examples/make_berts.py

It takes seconds and leaves the folders `berts` (pretrained, mood, topic) and `texts` (train.csv and test.csv of each
task) in the working directory. The sentences of mood praise or blame a film, those of topic are about an animal or a
vehicle.
"""

import csv
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForPreTraining, BertForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging

PRAISE = "lovely superb splendid charming brilliant graceful delightful pleasant elegant marvellous".split()  # noqa: SIM905
BLAME = "awful dreadful clumsy boring horrid ugly tedious shabby dismal miserable".split()  # noqa: SIM905
ANIMALS = "dog cat horse otter eagle badger heron rabbit lizard donkey".split()  # noqa: SIM905
VEHICLES = "tram lorry bicycle ferry glider tractor canoe scooter wagon rocket".split()  # noqa: SIM905
FILMS = "film play scene actor music story ending screen ticket cinema".split()  # noqa: SIM905
PLACES = "road field river barn bridge harbour valley village forest station".split()  # noqa: SIM905
REST = "the a that this looked seemed was and so very rather quite today again not far near".split()  # noqa: SIM905
TASKS = {"mood": (BLAME, PRAISE), "topic": (ANIMALS, VEHICLES)}
ABOUT = {"mood": FILMS, "topic": PLACES}
CLASSES = 2


def sentence(draw: random.Random, task: str) -> tuple[str, int]:
    """A sentence of a task, and its label."""
    label = draw.randrange(CLASSES)
    words = [
        *draw.choices(REST, k=draw.randint(3, 7)),
        *draw.choices(ABOUT[task], k=2),
        draw.choice(TASKS[task][label]),
    ]
    draw.shuffle(words)
    return " ".join(words), label


def save_tokenizer(folder: Path) -> int:
    """A tokenizer of whole words; returns the size of its vocabulary."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PRAISE, *BLAME, *ANIMALS, *VEHICLES, *FILMS, *PLACES, *REST]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return len(words)


def train(model, inputs: dict, labels: torch.Tensor, steps: int, lr: float) -> None:
    """Adam on random batches of 64; of a label below 0 nothing is learned."""
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(labels), (64,))
        outputs = model(**{name: values[rows] for name, values in inputs.items()})
        logits = outputs.prediction_logits if isinstance(model, BertForPreTraining) else outputs.logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels[rows].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    draw = random.Random(0)
    torch.manual_seed(0)
    splits = {"train": 500, "test": 400}
    rows = {(task, split): [sentence(draw, task) for _ in range(n)] for task in TASKS for split, n in splits.items()}
    for (task, split), sentences in rows.items():
        folder = Path("texts", task)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *sentences])
    base = Path("berts", "pretrained")
    size = save_tokenizer(base)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    encode = lambda texts: dict(tokenizer(texts, padding=True, return_tensors="pt"))
    encoded = encode([text for task in TASKS for text, _ in rows[task, "train"]])
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    bert = BertForPreTraining(BertConfig(vocab_size=size, max_position_embeddings=32, **sizes))
    hidden = (torch.rand(encoded["input_ids"].shape) < 0.2) & (encoded["input_ids"] > 4)
    targets = encoded["input_ids"].masked_fill(~hidden, -100)
    masked = {**encoded, "input_ids": encoded["input_ids"].masked_fill(hidden, 4)}
    train(bert, masked, targets, steps=150, lr=2e-3)
    bert.save_pretrained(base)
    for task in TASKS:
        expert = BertForSequenceClassification.from_pretrained(base, num_labels=CLASSES)
        texts, labels = zip(*rows[task, "train"], strict=True)
        train(expert, encode(list(texts)), torch.tensor(labels), steps=30, lr=2e-3)
        expert.save_pretrained(Path("berts", task))
        tokenizer.save_pretrained(Path("berts", task))
    print("berts: pretrained, mood, topic; texts: mood, topic")


if __name__ == "__main__":
    main()
