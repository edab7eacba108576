"""Image classifiers: a convolutional network with BatchNorm through the whole pipeline, and other architectures."""

import json

import numpy as np
import pytest
import torch
import yaml
from desk import refused
from PIL import Image

from suture.checkpoints import open_checkpoint
from suture.cli.main import main
from suture.evaluation import task_inputs
from suture.families.image_classification import ImageClassification
from suture.tasks import Task

SIDE, CLASSES = 32, {"shade": ("dark", "light"), "hue": ("red", "green", "blue")}


def save_processor(directory, kind="ConvNextImageProcessor"):
    """What a published model's folder has; the size is the tests' own."""
    words = {"image_processor_type": kind, "size": {"shortest_edge": SIDE}, "do_normalize": True, "do_resize": True}
    words |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "do_rescale": True, "resample": 3}
    words |= {"rescale_factor": 1 / 255, "crop_pct": 0.875}
    if kind == "ViTImageProcessor":
        words["size"] = {"height": SIDE, "width": SIDE}
    (directory / "preprocessor_config.json").write_text(json.dumps(words))


def draw(folder, name, count=5):
    generator = np.random.default_rng(len(name))
    for split in ("train", "test"):
        for label, class_name in enumerate(CLASSES[name]):
            for i in range(count):
                pixels = generator.integers(0, 120, (40, 36, 3), dtype=np.uint8)
                pixels[..., label if name == "hue" else slice(None)] += 100 if name == "hue" or label else 0
                path = folder / split / class_name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)


def make(kind, folder, name, classes, **more):
    """A model of random weights; those of the heads are not the small ones that training starts from."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(num_labels=classes, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    generator = torch.Generator().manual_seed(len(name))
    for _, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name != "base":
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator).abs())
    model.save_pretrained(folder / name)
    return model.eval()


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 3], "layer_type": "basic"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnets")
    make("ResNet", folder, "base", 7, **RESNET)
    save_processor(folder / "base")
    for name, names in CLASSES.items():
        make("ResNet", folder, name, len(names), **RESNET)
        draw(folder / "data" / name, name)
    return folder


@pytest.fixture
def words(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = {"_pretrained_": str(shop / "base"), **{name: str(shop / name) for name in CLASSES}}
    tasks = {n: {"source": str(shop / "data" / n), "classnames": list(names)} for n, names in CLASSES.items()}

    def write(*more, method="task_arithmetic", **changes):
        (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"family": "image_classification", "models": models}))
        (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"tasks": {**tasks, **changes}}))
        return [f"method={method}", "modelpool=pool.yaml", "taskpool=tasks.yaml", "output=out", *more]

    return write


def theirs(directory, shop, name):
    """The logits of transformers, with its own image processor."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(directory).eval()
    processor = AutoImageProcessor.from_pretrained(shop / "base", backend="pil")
    paths = [p for c in CLASSES[name] for p in sorted((shop / "data" / name / "test" / c).glob("*.png"))]
    pixels = processor([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(pixel_values=pixels).logits


def task_of(shop, name):
    return Task(name, str(shop / "data" / name), CLASSES[name])


def test_a_resnet_goes_through_the_whole_pipeline(words, shop, tmp_path):
    learn = ["method.max_steps=3", "method.batch_size=4", "surgery=deep", "surgery.steps=5", "surgery.rank=2"]
    assert main(words(*learn, method="lw_adamerging")) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["samples"] == {"hue": 15, "shade": 10}
    assert any("BatchNorm statistics" in note for note in report["notes"])
    seen = report["repairs"]["lw_adamerging + deep"]["representation"]["after"]["l1"]["hue"]
    assert [place for place in seen if place.startswith("resnet.encoder.stages.1.layers")]
    family = ImageClassification(shop / "base", experts={n: open_checkpoint(shop / n) for n in CLASSES})
    encoder = family.encoder(open_checkpoint(tmp_path / "out" / "model"))
    for name in CLASSES:
        inputs = task_inputs(family, task_of(shop, name))
        expected = theirs(tmp_path / "out" / "model" / "tasks" / name, shop, name)
        torch.testing.assert_close(inputs.logits(encoder(inputs.inputs)), expected, rtol=1e-3, atol=1e-3)
        experts = inputs.logits(family.encoder(open_checkpoint(shop / name))(inputs.inputs))
        torch.testing.assert_close(experts, theirs(shop / name, shop, name), rtol=1e-3, atol=1e-3)


LEARNED = ["method.max_steps=2", "method.batch_size=4"]
CHANGES = [
    ("lw_adamerging", [*LEARNED, "surgery=deep", "surgery.steps=3", "surgery.rank=2"]),
    ("ties_merging", ["surgery=calibrate"]),
    *((method, []) for method in ("regmean", "fisher")),
    pytest.param("lw_adamerging", [*LEARNED, "surgery=distil", "surgery.steps=3"], marks=pytest.mark.slow),
    *(pytest.param(method, [], marks=pytest.mark.slow) for method in ("regmean_pp", "esm")),
]


@pytest.mark.parametrize(("method", "more"), CHANGES, ids=str)
def test_a_resnet_with_channels_last_gives_the_same_model(method, more, words, tmp_path):
    assert main(words(*more, method=method)) == 0
    assert main(words(*more, "fabric.channels_last=true", "output=last", method=method)) == 0
    plain, last = (json.loads((tmp_path / out / "report.json").read_text()) for out in ("out", "last"))
    assert [row["name"] for row in last["rows"]] == [row["name"] for row in plain["rows"]]
    assert "Pictures and kernels had their channels last (fabric.channels_last=true)." in last["notes"]
    one, two = (dict(open_checkpoint(tmp_path / out / "model")) for out in ("out", "last"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-3)


def test_statistics_are_merged_and_their_counters_are_the_bases(words, shop, tmp_path):
    assert main(words("taskpool=null")) == 0
    merged, base = (open_checkpoint(path) for path in (tmp_path / "out" / "model", shop / "base"))
    experts = [open_checkpoint(shop / name) for name in CLASSES]
    name = "resnet.encoder.stages.1.layers.0.layer.0.normalization.running_var"
    torch.testing.assert_close(merged[name], base[name] + 0.3 * sum(e[name] - base[name] for e in experts))
    counters = [name for name in base if name.endswith("num_batches_tracked")]
    assert counters
    assert all(torch.equal(merged[name], base[name]) for name in counters)


@pytest.mark.parametrize(
    ("kind", "processor", "sizes"),
    [
        (
            "ViT",
            "ViTImageProcessor",
            {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
            | {"image_size": SIDE, "patch_size": 8},
        ),
        ("ConvNext", "ConvNextImageProcessor", {"hidden_sizes": [8, 12], "depths": [1, 2], "num_stages": 2}),
        (
            "Swin",
            "ViTImageProcessor",
            {"image_size": SIDE, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        ),
    ],
)
def test_other_architectures_give_the_logits_of_transformers(tmp_path, kind, processor, sizes):
    make(kind, tmp_path, "base", 5, **sizes)
    save_processor(tmp_path / "base", processor)
    model = make(kind, tmp_path, "hue", 3, **sizes)
    if kind == "ViT":  # a pretrained model without a head has names without a prefix
        make(kind, tmp_path, "base", 5, **sizes).base_model.save_pretrained(tmp_path / "base")
    family = ImageClassification(tmp_path / "base", experts={"hue": open_checkpoint(tmp_path / "hue")})
    assert family.reader.shape == (3, SIDE, SIDE)
    pixels = torch.rand(4, 3, SIDE, SIDE)
    features = family.encoder(open_checkpoint(tmp_path / "hue"))(pixels)
    with torch.no_grad():
        torch.testing.assert_close(family.head(task_of(tmp_path, "hue"))(features), model(pixels).logits)
    family.save(open_checkpoint(tmp_path / "hue"), tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out" / "tasks" / "hue")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_an_architecture_whose_head_takes_something_else_is_refused(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
    make("Dinov2", tmp_path, "base", 5, **sizes)
    save_processor(tmp_path / "base", "ViTImageProcessor")
    with pytest.raises(Exception, match="whose head takes neither the pooled feature nor the first token's"):
        ImageClassification(tmp_path / "base").encoder()


def test_bad_input_is_one_line(words, shop, capsys):
    text = {"source": str(shop / "data" / "hue"), "classnames": list(CLASSES["hue"]), "text_columns": ["a"]}
    assert "'hue' has text_columns, but family=image_classification reads pictures" in refused(capsys, words(hue=text))
    fewer = {"source": str(shop / "data" / "hue"), "classnames": ["red", "green"]}
    assert "'hue' has 2 class names but the head of its model has 3 classes" in refused(capsys, words(hue=fewer))
