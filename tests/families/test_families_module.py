"""Any network from the command line: a function of one's own, tensors, images and texts, heads of each kind."""

import json

import numpy as np
import pytest
import torch
import yaml
from desk import refused
from PIL import Image
from torch import nn

from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.cli.main import main

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8, outputs=3):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))  # a parameter of the module itself
        self.register_buffer("shift", torch.zeros(6))
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(width, outputs)

    def forward(self, x):
        return self.head(self.body((x - self.shift) * self.scale))

class Named(Net):
    def forward(self, values, mask):
        return {"logits": super().forward(values * mask)}

def make(**sizes):
    return Net(**sizes)

def named(**sizes):
    return Named(**sizes)

def pictures():
    return Net(), lambda image: torch.tensor(list(image.resize((2, 1)).tobytes())).float() / 255

def words():
    return Net(), lambda text, pair: torch.tensor([float(text.count(c) + pair.count(c)) for c in "abcdef"])

def not_a_module():
    return 3

def fails():
    raise RuntimeError("no such thing")
"""
NAMES = ("left", "right")


def net(folder, **sizes):
    code = {}
    exec(CODE, code)
    return code["Net"](**sizes)


def data(name, split, count=60):
    """Points in six dimensions; their class is the largest of three coordinates that belong to the task."""
    draw = torch.Generator().manual_seed(len(name + split))
    inputs = torch.randn(count, 6, generator=draw)
    return inputs, inputs[:, :3].argmax(1) if name == "left" else inputs[:, 3:].argmax(1)


def trained(model, inputs, labels, steps=80):
    adam = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        adam.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        adam.step()
    return model.eval()


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    torch.manual_seed(0)
    base = net(folder, width=32).train()
    torch.save(base.state_dict(), folder / "base.pt")
    for name in NAMES:
        (folder / "data" / name).mkdir(parents=True)
        for split in ("train", "test"):
            inputs, labels = data(name, split)
            torch.save({"inputs": inputs, "labels": labels}, folder / "data" / name / f"{split}.pt")
        expert = net(folder, width=32)
        expert.load_state_dict(base.state_dict())
        torch.save(trained(expert, *data(name, "train", 200)).state_dict(), folder / f"{name}.pt")
    return folder


@pytest.fixture
def desk_of(nets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(CODE)
    models = {"_pretrained_": str(nets / "base.pt"), **{name: str(nets / f"{name}.pt") for name in NAMES}}
    tasks = {name: {"source": str(nets / "data" / name), "classnames": ["a", "b", "c"]} for name in NAMES}

    def write(*more, method="task_arithmetic", tasks=tasks, **pool):
        pool = {"family": "module", "module": "nets.py:make", "arguments": {"width": 32}, "models": models} | pool
        (tmp_path / "pool.yaml").write_text(yaml.safe_dump(pool))
        (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
        return [f"method={method}", "modelpool=pool.yaml", "taskpool=tasks.yaml", "output=out", *more]

    return write


def rows_of(folder):
    report = json.loads((folder / "out" / "report.json").read_text())
    return {row["name"]: row["accuracies"] for row in report["rows"]}


def accuracy(model, name):
    inputs, labels = data(name, "test")
    with torch.no_grad():
        return (model(inputs).argmax(1) == labels).double().mean().item()


def test_a_network_goes_through_check_merge_scores_and_page(desk_of, nets, tmp_path):
    words = desk_of()
    assert main(["check", *words]) == 0
    assert main(words) == 0
    rows = rows_of(tmp_path)
    for name in NAMES:
        expert = net(nets, width=32).eval()
        expert.load_state_dict(torch.load(nets / f"{name}.pt"))
        assert rows["experts"][name] == accuracy(expert, name) > 0.8
    merged = net(nets, width=32).eval()
    merged.load_state_dict(dict(open_checkpoint(tmp_path / "out" / "model")))
    assert rows["task_arithmetic"] == {name: accuracy(merged, name) for name in NAMES}
    assert (tmp_path / "out" / "report.html").is_file()
    base, left = open_checkpoint(nets / "base.pt"), open_checkpoint(nets / "left.pt")
    right = open_checkpoint(nets / "right.pt")
    for name, tensor in merged.state_dict().items():
        if tensor.is_floating_point():
            expected = base[name] + 0.3 * (left[name] - base[name] + right[name] - base[name])
            torch.testing.assert_close(tensor, expected)


def test_adamerging_learns_and_a_repair_brings_accuracy_back(desk_of, tmp_path):
    learn = ["method.max_steps=40", "method.lr=0.02", "method.batch_size=16"]
    repair = ["repair=final", "repair.steps=200", "repair.lr=0.02", "repair.rank=8"]
    assert main(desk_of(*learn, *repair, method="lw_adamerging")) == 0
    rows = rows_of(tmp_path)
    mean = {name: sum(row.values()) / 2 for name, row in rows.items()}
    assert mean["lw_adamerging"] <= mean["lw_adamerging + final"] > 0.6
    history = open_checkpoint(tmp_path / "out" / "history.safetensors")["losses"]
    assert history[-5:].mean() < history[:5].mean()


def test_the_head_stays_each_expert_s_own(desk_of, nets, tmp_path):
    other = dict(open_checkpoint(nets / "right.pt"))
    other["head.weight"], other["head.bias"] = torch.randn(5, 32), torch.randn(5)
    save_checkpoint(other, tmp_path / "right.safetensors")
    models = {"_pretrained_": str(nets / "base.pt"), "left": str(nets / "left.pt"), "right": "right.safetensors"}
    tasks = {name: {"source": str(nets / "data" / name)} for name in NAMES}
    tasks["left"]["classnames"], tasks["right"]["classnames"] = ["a", "b", "c"], ["a", "b", "c", "d", "e"]
    assert main(desk_of(models=models, tasks=tasks, head="head")) == 0
    model = open_checkpoint(tmp_path / "out" / "model")
    assert not [name for name in model if name.startswith("head")]
    kept = open_checkpoint(tmp_path / "out" / "model" / "heads" / "right.safetensors")
    assert torch.equal(kept["weight"], other["head.weight"])
    merged = net(nets, width=32, outputs=5).eval()
    merged.load_state_dict(dict(model) | {f"head.{name}": kept[name] for name in kept})
    assert rows_of(tmp_path)["task_arithmetic"]["right"] == accuracy(merged, "right")


def test_heads_come_from_files(desk_of, nets, tmp_path):
    generator = torch.Generator().manual_seed(0)
    heads = {name: torch.randn(2, 3, generator=generator) for name in NAMES}
    for name, weight in heads.items():
        save_checkpoint({"probe.weight": weight}, tmp_path / f"{name}-head.safetensors")
        for split in ("train", "test"):
            inputs, labels = data(name, split)
            (tmp_path / name).mkdir(exist_ok=True)
            np.save(tmp_path / name / f"{split}.npy", inputs.double().numpy())
            np.save(tmp_path / name / f"{split}_labels.npy", (labels > 0).long().numpy())
    tasks = {name: {"source": name, "classnames": ["no", "yes"]} for name in NAMES}
    files = {name: f"{name}-head.safetensors" for name in NAMES}
    assert main(desk_of(tasks=tasks, heads=files)) == 0
    merged = net(nets, width=32).eval()
    merged.load_state_dict(dict(open_checkpoint(tmp_path / "out" / "model")))
    for name in NAMES:
        inputs, labels = data(name, "test")
        with torch.no_grad():
            right = ((merged(inputs) @ heads[name].T).argmax(1) == (labels > 0)).double().mean().item()
        assert rows_of(tmp_path)["task_arithmetic"][name] == right


def test_inputs_of_several_arguments_and_outputs_with_logits(desk_of, nets, tmp_path):
    for name in NAMES:
        for split in ("train", "test"):
            inputs, labels = data(name, split)
            (tmp_path / name).mkdir(exist_ok=True)
            tensors = {"values": inputs, "mask": torch.ones_like(inputs), "labels": labels}
            save_checkpoint(tensors, tmp_path / name / f"{split}.safetensors")
    tasks = {name: {"source": name, "classnames": ["a", "b", "c"]} for name in NAMES}
    assert main(desk_of()) == 0
    plain = rows_of(tmp_path)
    assert main(desk_of("overwrite=true", tasks=tasks, module="nets.py:named", arguments={"width": 32})) == 0
    assert rows_of(tmp_path) == plain


def test_images_and_texts_go_through_the_transform_that_came_with_the_module(desk_of, nets, tmp_path):
    for i, (label, colour) in enumerate(zip("abc", ((255, 0, 0), (0, 255, 0), (0, 0, 255)), strict=True)):
        for split in ("train", "test"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for j in range(3):
                Image.new("RGB", (4, 4), tuple(max(0, c - 10 * j - i) for c in colour)).save(folder / f"{j}.png")
    code = CODE.replace("return Net(), lambda", "return Net(width=32), lambda")
    (tmp_path / "nets.py").write_text(code)
    images = {name: {"source": "images", "classnames": ["a", "b", "c"]} for name in NAMES}
    assert main(desk_of(tasks=images, module="nets.py:pictures", arguments={})) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["samples"] == dict.fromkeys(NAMES, 9)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "test.csv").write_text("one,two,label\nabc,aa,0\nbbb,b,1\nccc,c,2\n")
    texts = {"source": "texts", "text_columns": ["one", "two"], "classnames": ["a", "b", "c"]}
    words = desk_of("overwrite=true", tasks=dict.fromkeys(NAMES, texts), module="nets.py:words", arguments={})
    assert main(words) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["samples"] == dict.fromkeys(NAMES, 3)


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"module": None}, "needs module"),
        ({"module": "nets.py"}, "wanted package.module:function"),
        ({"module": "nowhere.py:make"}, "'nowhere.py' does not exist"),
        ({"module": "nets.py:nothing"}, "has no 'nothing'"),
        ({"module": "no_such_package.mod:make"}, "cannot be imported"),
        ({"module": "nets.py:fails", "arguments": {}}, "failed (RuntimeError: no such thing)"),
        ({"module": "nets.py:make", "arguments": {"widths": 3}}, "failed (TypeError"),
        ({"module": "nets.py:not_a_module", "arguments": {}}, "gives a int"),
        ({"arguments": {"width": 16}}, "shape"),
        ({"arguments": {"outputs": 4, "width": 32}}, "(3, 32) in '_pretrained_', but (4, 32) in the network"),
        ({"head": "body.0"}, "has 32 classes"),
        ({"head": "tail"}, "'tail' does not exist in the module"),
        ({"head": "body"}, "is a Sequential"),
        ({"heads": {"left": "x.pt"}}, "'x.pt'"),
        ({"module": "nets.py:named", "arguments": {"width": 32}}, "the module fails on inputs (2, 6) float32"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(desk_of, capsys, pool, message):
    assert message in refused(capsys, desk_of(**pool))


def test_check_finds_a_network_of_other_shapes(desk_of, capsys):
    words = desk_of(arguments={"width": 16})
    assert main(["check", *words]) == 2
    assert "Remedy: check module and arguments in the pool" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"inputs": torch.zeros(4, 6)}, "has no labels"),
        ({"inputs": torch.zeros(4, 6), "labels": torch.zeros(3).long()}, "wanted N inputs and labels (N,)"),
        ({"inputs": torch.zeros(2, 6), "labels": torch.tensor([0, 3])}, "labels from 0 to 3"),
        ({"labels": torch.zeros(3).long()}, "labels alone"),
        ({"inputs": torch.zeros(0, 6), "labels": torch.zeros(0).long()}, "no input"),
        ({"inputs": torch.zeros(2, 5), "labels": torch.zeros(2).long()}, "(2, 5) float32"),
    ],
)
def test_files_of_tensors_that_hold_something_else_are_refused(desk_of, tmp_path, capsys, tensors, message):
    (tmp_path / "odd").mkdir()
    torch.save(tensors, tmp_path / "odd" / "test.pt")
    task = {"source": "odd", "classnames": ["a", "b", "c"]}
    assert message in refused(capsys, desk_of(tasks={"left": task}))


def test_images_without_a_transform_are_refused_before_the_merge(desk_of, tmp_path, capsys):
    for label in "abc":
        (tmp_path / "images" / "test" / label).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / "test" / label / "0.png")
    task = {"source": "images", "classnames": ["a", "b", "c"]}
    assert "no transform" in refused(capsys, desk_of(tasks={"left": task}))


def test_init_takes_files_of_weights_for_modules_and_files_of_tensors_for_data(nets, tmp_path):
    from suture.pipeline.starting import init

    started = init([nets], tmp_path)
    pool, tasks = (yaml.safe_load(path.read_text()) for path in (started.modelpool, started.taskpool))
    assert pool["family"] == "module"
    assert pool["module"] is None
    assert list(pool["models"]) == ["_pretrained_", *NAMES]
    assert {name: task["source"] for name, task in tasks["tasks"].items()} == {n: str(nets / "data" / n) for n in NAMES}
