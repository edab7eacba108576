"""Tiny language models of several architectures, experts that were trained on the spot, and their tasks."""

import json
import random
import warnings
from pathlib import Path

import torch
import yaml

COLOURS, ANIMALS = ("red", "blue", "green", "black"), ("cat", "dog", "bird", "fish")
SENTENCES = {"colour": COLOURS, "animal": ANIMALS}
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
}


def save_tokenizer(directory: Path, *, chat: bool = False, turned: bool = False) -> int:
    """A byte-level tokenizer with some merges; the size of its vocabulary. `turned`: with two tokens exchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text for name in SENTENCES for text in texts(name, 60)], trainer)
    if turned:
        content = json.loads(backend.to_str())
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        backend = Tokenizer.from_str(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="<s>")
    if chat:
        tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<a>"
    tokenizer.save_pretrained(directory)
    return backend.get_vocab_size()


def texts(name: str, count: int, seed: int = 0) -> list[str]:
    """Sentences about colours or animals: the second word of each decides its last."""
    draw = random.Random(f"{name}{seed}")
    words = SENTENCES[name]
    numbers = [draw.randrange(4) for _ in range(count)]
    return [f"the {name} {words[n]} is {words[(n + 1) % 4]}." for n in numbers]


def new_model(kind: str, vocabulary: int):
    """A random model of an architecture: llama, qwen3, gemma or mixtral."""
    import transformers

    torch.manual_seed(0)
    own = {
        "llama": {},
        "qwen3": {"head_dim": 8},
        "gemma": {"head_dim": 8},
        "gemma2": {"head_dim": 8, "sliding_window": 16},
        "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
        "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
        "granitemoe": {"num_local_experts": 3, "num_experts_per_tok": 2, "logits_scaling": 2.0},
    }[kind]
    prefix = {"llama": "Llama", "qwen3": "Qwen3", "gemma": "Gemma", "gemma2": "Gemma2", "mixtral": "Mixtral"}
    prefix = (prefix | {"granitemoe": "GraniteMoe", "qwen3_moe": "Qwen3Moe"})[kind]
    tied = kind in ("gemma", "gemma2", "qwen3")
    facts = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = getattr(transformers, f"{prefix}Config")(**_SIZES, **facts, tie_word_embeddings=tied, **own)
    return getattr(transformers, f"{prefix}ForCausalLM")(config).eval()


def train(model, tokenizer, name: str, steps: int = 25, rate: float = 5e-3):
    """The model after some steps of Adam on sentences of a task."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=rate)
    batch = tokenizer([tokenizer.bos_token + text for text in texts(name, 32)], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model.train()
    for _ in range(steps):
        adam.zero_grad()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        adam.step()
    return model.eval()


def adapted(model):
    """The model with LoRA adapters to train."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))


def build_shop(folder: Path, kind: str = "llama", *, lora: bool = False, chat: bool = False) -> Path:
    """`base`, `colour` and `animal` in a folder, with `data` of every kind of score."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    vocabulary = save_tokenizer(folder / "base", chat=chat)
    new_model(kind, vocabulary).save_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    for name in SENTENCES:
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft uses what transformers calls deprecated
            train(adapted(model) if lora else model, tokenizer, name).save_pretrained(folder / name)
        write_data(folder / "data" / name, name)
    return folder


def write_data(folder: Path, name: str, count: int = 16) -> None:
    """train.jsonl and test.jsonl with the columns text, beginning, endings, answer and word."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(("train", "test")):
        rows = []
        for text in texts(name, count, seed + 1):
            beginning, _, last = text.rpartition(" ")
            words = list(SENTENCES[name])
            endings = [f"{word}." for word in words]
            row = {"text": text, "beginning": beginning, "endings": endings, "answer": endings.index(last)}
            rows.append(row | {"word": last.rstrip(".")})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


SCORES = {
    "text": {"score": "bits_per_byte"},
    "choice": {"score": {"metric": "acc_norm", "choices_column": "endings"}, "text_columns": ["beginning"]},
    "answer": {
        "score": {"metric": "exact_match", "stop": ["."], "max_new_tokens": 6},
        "text_columns": ["beginning"],
        "label_column": "word",
    },
}


def write_pools(shop: Path, where: Path, kinds: dict[str, str] | str = "text", **pool) -> list[str]:
    """pool.yaml and tasks.yaml in a folder; the arguments that name them."""
    models = {"_pretrained_": str(shop / "base"), **{name: str(shop / name) for name in SENTENCES}}
    kinds = dict.fromkeys(SENTENCES, kinds) if isinstance(kinds, str) else kinds
    tasks = {name: {"source": str(shop / "data" / name), **SCORES[kind]} for name, kind in kinds.items()}
    (where / "pool.yaml").write_text(yaml.safe_dump({"family": "causal_lm", "models": models, **pool}))
    (where / "tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    return [f"modelpool={where / 'pool.yaml'}", f"taskpool={where / 'tasks.yaml'}"]
