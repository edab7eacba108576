"""A tiny pool of text classifiers on disk, trained on the spot, and the words of a run on it."""

import pytest
import yaml
from tiny_texts import TASKS, bert_config, save_tokenizer, trained, write_task

NAMES = ("colour", "animal")


@pytest.fixture(scope="session")
def text_shop(tmp_path_factory):
    """A pretrained BERT with the heads of its own training, two experts, and their data."""
    import torch
    from transformers import AutoTokenizer, BertForPreTraining, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("texts")
    vocabulary = save_tokenizer(folder / "base")
    torch.manual_seed(0)
    BertForPreTraining(bert_config(vocabulary)).save_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    for name in NAMES:
        write_task(folder / "data" / name, name)
        expert = BertForSequenceClassification.from_pretrained(folder / "base", num_labels=2)
        trained(expert, tokenizer, folder / "data" / name).save_pretrained(folder / name)
    return folder


@pytest.fixture
def texts(text_shop, tmp_path, monkeypatch):
    """The words of a run, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return TextDesk(text_shop, tmp_path)


class TextDesk:
    family = "sequence_classification"

    def __init__(self, shop, folder):
        self.shop, self.folder = shop, folder
        self.pool = {"family": self.family, "models": {"_pretrained_": str(shop / "base")}}
        self.pool["models"] |= {name: str(shop / name) for name in NAMES}
        self.tasks = {
            name: {
                "source": str(shop / "data" / name),
                "text_columns": ["first", "second"],
                "classnames": list(TASKS[name]),
            }
            for name in NAMES
        }

    def words(self, *more, method="task_arithmetic"):
        (self.folder / "pool.yaml").write_text(yaml.safe_dump(self.pool))
        (self.folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": self.tasks}))
        return [f"method={method}", "modelpool=pool.yaml", "taskpool=tasks.yaml", "output=out", *more]
