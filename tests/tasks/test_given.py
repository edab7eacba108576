"""Inputs in the forms that people have them, for every verb alike."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import suture
from suture.errors import DataError
from suture.tasks.given import inputs_of, labelled

ROWS, LABELS = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 0, 1, 1, 0])
WORDS = {"ids": torch.arange(12).reshape(6, 2), "mask": torch.ones(6, 2)}


def saved(folder, name, value):
    path = folder / name
    if path.suffix == ".npy":
        np.save(path, value.numpy())
    elif path.suffix == ".pt":
        torch.save({"inputs": value, "labels": LABELS}, path)
    else:
        save_file({"inputs": value, "labels": LABELS}, path)
    return path


@pytest.fixture(params=["tensor", "array", "loader", "pairs", "task", ".npy", ".pt", ".safetensors"])
def given(request, tmp_path):
    forms = {
        "tensor": lambda: ROWS,
        "array": lambda: ROWS.numpy(),
        "loader": lambda: DataLoader(TensorDataset(ROWS), 4),
        "pairs": lambda: DataLoader(TensorDataset(ROWS, LABELS), 4),
        "task": lambda: suture.TaskInputs("t", ROWS, LABELS),
    }
    return forms[request.param]() if request.param in forms else saved(tmp_path, f"x{request.param}", ROWS)


def test_every_form_gives_the_same_inputs(given):
    torch.testing.assert_close(inputs_of(given, "t"), ROWS, rtol=0, atol=0)


def test_mappings_stay_mappings_without_their_labels():
    assert inputs_of({**WORDS, "labels": LABELS}, "t").keys() == WORDS.keys()
    batches = [{key: value[:4] for key, value in WORDS.items()}, {key: value[4:] for key, value in WORDS.items()}]
    torch.testing.assert_close(dict(inputs_of(batches, "t")), WORDS)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (3, "The inputs of task 't' are a int; wanted a tensor"),
        ([], "The inputs of task 't' have no batches"),
        ([torch.ones(2, 3), torch.ones(2, 4)], "batches differ in shape. Remedy: pad"),
        (["text"], "there is no file 'text'|A batch of task 't' is a str"),
        ("nowhere.npy", "there is no file 'nowhere.npy'"),
    ],
)
def test_anything_else_is_refused_in_one_line(given, line):
    with pytest.raises(DataError, match=line):
        inputs_of(given, "t")


def test_labels_come_from_pairs_loaders_and_files(tmp_path):
    for given in ((ROWS, LABELS), DataLoader(TensorDataset(ROWS, LABELS), 4), saved(tmp_path, "x.pt", ROWS)):
        inputs, labels = labelled(given, "t")
        assert torch.equal(inputs, ROWS)
        assert torch.equal(labels, LABELS)
    with pytest.raises(DataError, match=r"has no labels\. Remedy: give \(inputs, labels\)"):
        labelled(ROWS, "t")


def test_each_verb_takes_them_and_gives_the_same_result(given):
    torch.manual_seed(0)
    base, expert = nn.Linear(2, 3), nn.Linear(2, 3)
    adapted = suture.adapt(base, base, {"t": expert}, {"t": ROWS}, max_steps=3, batch_size=2)
    if not isinstance(given, DataLoader):  # whose batches are taken as they are
        again = suture.adapt(base, base, {"t": expert}, {"t": given}, max_steps=3, batch_size=2)
        assert torch.equal(adapted.history, again.history)
    one, other = (suture.repair(base, {"t": expert}, {"t": x}, "final", rank=2, steps=5) for x in (ROWS, given))
    assert torch.equal(one.losses, other.losses)


def test_a_mapping_of_tasks_is_scored_as_a_row():
    model = nn.Linear(2, 2)
    task = suture.TaskInputs("t", ROWS, LABELS)
    row = suture.evaluate(model, {"t": (ROWS, LABELS), "u": task}, name="mine")
    assert row.name == "mine"
    assert row.accuracies == {"t": suture.evaluate(model, task).value, "u": suture.evaluate(model, task).value}


def test_a_router_makes_the_task_unnecessary():
    experts, inputs = {"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)}, {"a": ROWS, "b": -ROWS}
    merged = nn.Linear(2, 3)
    repaired = suture.repair(merged, experts, inputs, "final", rank=2, steps=5, router=True).model
    assert torch.equal(repaired(ROWS[3:]), repaired(ROWS[3:], "a"))
    with pytest.raises(suture.SutureError, match=r"one model for all tasks\. Remedy: leave router=True out"):
        suture.repair(merged, experts, inputs, "distil", router=True)
    with pytest.raises(suture.SutureError, match="Unknown router 'nearest'"):
        suture.repair(merged, experts, inputs, router="nearest")  # pyright: ignore
