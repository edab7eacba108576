"""A small Llama, two LoRA adapters of it and their texts, made on the spot: python examples/make_loras.py

It takes seconds, needs peft, and leaves the folders `llama`, `adapters` (math and code) and `texts` (train.jsonl and
test.jsonl of each task) in the working directory. The texts of math double a number, those of code close a bracket or a
block; the Llama knows the words but not the answers.
"""

import json
import random
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

NUMBERS = "zero one two three four five six seven eight nine".split()  # noqa: SIM905
DOUBLES = "zero two four six eight ten twelve fourteen sixteen eighteen".split()  # noqa: SIM905
BLOCKS = {"if": "fi", "case": "esac", "do": "done", "begin": "end", "(": ")", "[": "]", "{": "}", "<": ">"}
REST = "so now well then here again today always and but".split()  # noqa: SIM905
ANSWERS = {"math": dict(zip(NUMBERS, DOUBLES, strict=True)), "code": BLOCKS}
FORMS = {"math": "twice {} is", "code": "{} ends with"}
WORDS = ["<pad>", "<s>", *REST, *NUMBERS, *DOUBLES, *BLOCKS, *BLOCKS.values(), "twice", "is", "ends", "with"]
SPLITS = {"train": 500, "test": 200}


def row(draw: random.Random, task: str, right: bool = True) -> dict[str, str]:
    """A question of a task with its answer, or with that of any other question."""
    answers = ANSWERS[task]
    asked = draw.choice([*answers])
    answer = answers[asked if right else draw.choice([*answers])]
    question = " ".join([*draw.choices(REST, k=draw.randint(1, 4)), FORMS[task].format(asked)])
    return {"question": question, "answer": answer}


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(WORDS))}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="<s>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def train(model, tokenizer, rows: list[dict[str, str]], steps: int, lr: float) -> None:
    """Adam on random batches of 64 rows."""
    texts = [f"{row['question']} {row['answer']} <s>" for row in rows]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    adam = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        drawn = torch.randint(len(texts), (64,))
        loss = model(**{name: values[drawn] for name, values in inputs.items()}, labels=labels[drawn]).loss
        adam.zero_grad()
        loss.backward()
        adam.step()


def main() -> None:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise SystemExit("make_loras.py needs peft. Remedy: pip install peft") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    draw = random.Random(0)
    torch.manual_seed(0)
    rows = {(task, split): [row(draw, task) for _ in range(n)] for task in ANSWERS for split, n in SPLITS.items()}
    for (task, split), each in rows.items():
        folder = Path("texts", task)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in each), "utf-8")
    tokenizer = save_tokenizer(Path("llama"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "max_position_embeddings": 128}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids))
    wrong = [row(draw, task, right=False) for task in ANSWERS for _ in range(500)]
    train(llama, tokenizer, wrong, steps=300, lr=3e-3)
    llama.save_pretrained("llama")
    for task in ANSWERS:
        base = LlamaForCausalLM.from_pretrained("llama")
        options = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        adapter = get_peft_model(base, options)
        train(adapter, tokenizer, rows[task, "train"], steps=200, lr=2e-3)
        adapter.save_pretrained(Path("adapters", task))
    print("llama; adapters: math, code; texts: math, code")


if __name__ == "__main__":
    main()
