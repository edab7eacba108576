import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_clip import SIDE, edit_json, save_tiny_clip
from torch import nn

from suture.core.head import Head
from suture.errors import CheckpointError, ConfigError
from suture.evaluation import evaluate, task_inputs
from suture.families import Encoder, companion_files, families, family
from suture.families.clip import Clip
from suture.tasks import Images, Task

NAMES = ("cat", "dog", "owl")
TEMPLATES = ("a photo of a {}.", "the {}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "pretrained")


@pytest.fixture(scope="module")
def reference(directory):
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(directory).eval()


@pytest.fixture
def clip(directory):
    return Clip(directory, load_file(directory / "model.safetensors"))


@pytest.fixture
def head_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUTURE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "heads"


@pytest.fixture
def counted(monkeypatch):
    """How often the text tower has been asked."""
    calls, encode = [], Clip._encode_text
    monkeypatch.setattr(Clip, "_encode_text", lambda self, prompts: calls.append(prompts) or encode(self, prompts))
    return calls


def noise(count=5, height=SIDE, width=SIDE):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def images(pixels):
    return Images(pixels, torch.zeros(len(pixels), dtype=torch.int64))


def drifted(weights, seed=1):
    """Another vision tower of the same architecture, by canonical names."""
    generator = torch.Generator().manual_seed(seed)
    names = Clip.canonical_names(weights)
    return {name: weights[name] + 0.1 * torch.randn(weights[name].shape, generator=generator) for name in names}


def test_the_registry_knows_clip_and_refuses_others_with_the_nearest_name():
    assert {"clip", "image_classification", "open_clip", "seq2seq", "sequence_classification"} <= set(families())
    assert family("clip") is Clip
    with pytest.raises(
        ConfigError, match=r"Unknown model family 'clipp'\. Did you mean 'clip' or 'open_clip'\? Known: causal_lm, clip"
    ):
        family("clipp")


def test_features_equal_those_of_transformers(clip, reference):
    pixels = torch.randn(7, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = reference.get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(clip.encoder()(pixels), expected, atol=1e-6, rtol=0)


def test_logits_equal_those_of_transformers(clip, reference, directory):
    from transformers import CLIPTokenizer

    pixels = clip.preprocess(images(noise()))
    prompts = [TEMPLATES[0].replace("{}", name) for name in NAMES]
    tokens = CLIPTokenizer.from_pretrained(directory)(prompts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = reference(pixel_values=pixels, **tokens).logits_per_image
        logits = clip.head(Task("", "", NAMES, TEMPLATES[:1]))(clip.encoder()(pixels))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits / clip.logit_scale, expected / clip.logit_scale, atol=1e-6, rtol=0)


def test_a_head_averages_normalised_templates_and_normalises_again(clip, reference, directory):
    from transformers import CLIPTokenizer

    tokenizer, expected = CLIPTokenizer.from_pretrained(directory), []
    for name in NAMES:
        encoded = []
        for template in TEMPLATES:
            tokens = tokenizer([template.replace("{}", name)], return_tensors="pt")
            with torch.inference_mode():
                encoded.append(reference.get_text_features(**tokens).pooler_output[0])
        mean = torch.stack([e / e.norm() for e in encoded]).mean(0)
        expected.append(mean / mean.norm())
    head = clip.directions(NAMES, TEMPLATES)
    assert head.dtype == torch.float32
    torch.testing.assert_close(head, torch.stack(expected), atol=1e-6, rtol=0)


def test_a_head_can_take_part_in_a_backward_pass(clip, head_cache):
    features = torch.randn(2, 8, requires_grad=True)
    for _ in ("made", "from the cache"):
        Head(clip.directions(NAMES, TEMPLATES), normalised=True)(features).sum().backward()


@pytest.mark.parametrize(("height", "width"), [(SIDE, SIDE), (28, 28), (20, 33), (7, 9)])
def test_preprocessing_equals_the_processor_of_transformers(clip, directory, height, width):
    from transformers import CLIPImageProcessorPil

    pictures = [Image.fromarray(array) for array in noise(3, height, width)]
    expected = CLIPImageProcessorPil.from_pretrained(directory)(pictures, return_tensors="pt")["pixel_values"]
    pixels = clip.preprocess(images(noise(3, height, width)))
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_the_encoder_takes_decoded_bytes_as_well_as_preprocessed_pixels(clip):
    encoder = clip.encoder()
    decoded = clip.decode(images(noise()))
    assert decoded.dtype == torch.uint8
    torch.testing.assert_close(encoder(decoded), encoder(clip.preprocess(images(noise()))))


def test_parameters_carry_the_canonical_names(clip):
    names = [name for name, _ in clip.encoder().named_parameters()]
    assert sorted(names) == sorted([*Clip.canonical_names(clip.weights), "visual_projection.weight"])


def test_every_way_of_naming_the_vision_tower_gives_the_same_canonical_names(clip):
    from transformers import CLIPVisionModel

    whole = Clip.canonical_names(clip.weights)
    bare = list(CLIPVisionModel(clip.config.vision_config).state_dict())
    prefixed = ["vision_model." + name for name in bare]
    assert whole.keys() == Clip.canonical_names(bare).keys() == Clip.canonical_names(prefixed).keys()
    assert all(name.startswith("vision_model.") for name in whole)
    assert Clip.canonical_names(bare)["vision_model.pre_layrnorm.bias"] == "pre_layrnorm.bias"


def test_position_ids_and_other_towers_are_out_of_scope():
    names = [
        "vision_model.embeddings.position_ids",
        "vision_model.embeddings.class_embedding",
        "text_model.embeddings.token_embedding.weight",
        "visual_projection.weight",
        "logit_scale",
    ]
    assert list(Clip.canonical_names(names)) == ["vision_model.embeddings.class_embedding"]
    assert Clip.canonical_names(["embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.bias"]) == {}


def test_loading_replaces_the_weights_in_place(clip):
    encoder, state = clip.encoder(), drifted(clip.weights)
    pixels = clip.decode(images(noise()))
    before, addresses = encoder(pixels), [p.data_ptr() for p in encoder.parameters()]
    after = encoder.load(state)(pixels)
    assert addresses == [p.data_ptr() for p in encoder.parameters()]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, clip.encoder(state)(pixels))
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    torch.testing.assert_close(after, encoder.load(bare)(pixels))


def test_the_weights_are_read_from_the_directory_when_none_are_given(clip, directory):
    pixels = clip.decode(images(noise()))
    torch.testing.assert_close(Clip(directory).encoder()(pixels), clip.encoder()(pixels), atol=0, rtol=0)


def test_half_precision_weights_are_computed_in_float32(clip):
    encoder = clip.encoder({name: tensor.half() for name, tensor in drifted(clip.weights).items()})
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert encoder(clip.decode(images(noise()))).dtype == torch.float32


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(clip):
    encoder, name = clip.encoder(), "vision_model.post_layernorm.bias"
    before = {n: p.clone() for n, p in encoder.named_parameters()}
    state = drifted(clip.weights)
    with pytest.raises(CheckpointError, match=rf"'{name}' is missing from 'the model' \(1 of 39 tensors are\)"):
        encoder.load({n: t for n, t in state.items() if n != name})
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \(3,\) but \(16,\) in the pretrained model"):
        encoder.load({**state, name: torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"'vision_model\.adapter\.bias' in 'the model' is not part of"):
        encoder.load({**state, "vision_model.adapter.bias": torch.zeros(3)})
    for n, p in encoder.named_parameters():
        torch.testing.assert_close(p, before[n])


def test_a_head_is_made_once_and_then_read_from_the_cache(directory, clip, head_cache, counted):
    first = clip.directions(NAMES, TEMPLATES)
    assert len(counted) == 1
    assert len(list(head_cache.iterdir())) == 1
    again = Clip(directory, load_file(directory / "model.safetensors")).directions(NAMES, TEMPLATES)
    assert len(counted) == 1
    torch.testing.assert_close(again, first, atol=0, rtol=0)


def test_other_names_templates_or_text_weights_make_another_head(directory, clip, head_cache, counted):
    clip.directions(NAMES, TEMPLATES)
    clip.directions(NAMES[::-1], TEMPLATES)
    clip.directions(NAMES, TEMPLATES[:1])
    weights = load_file(directory / "model.safetensors")
    weights["text_projection.weight"][0, 0] += 1
    Clip(directory, weights).directions(NAMES, TEMPLATES)
    assert len(counted) == 4
    assert len(list(head_cache.iterdir())) == 4


def test_another_tokenizer_makes_another_head(tmp_path, clip, head_cache, counted):
    copy = save_tiny_clip(tmp_path / "copy")
    clip.directions(NAMES, TEMPLATES)
    Clip(copy, load_file(copy / "model.safetensors")).directions(NAMES, TEMPLATES)
    assert len(counted) == 1
    edit_json(copy / "tokenizer_config.json", model_max_length=20)
    Clip(copy, load_file(copy / "model.safetensors")).directions(NAMES, TEMPLATES)
    assert len(counted) == 2


def test_the_vision_weights_and_the_model_s_place_do_not_matter_to_a_head(clip, directory, head_cache, counted):
    clip.directions(NAMES, TEMPLATES)
    Clip(directory, {**clip.weights, **drifted(clip.weights)}).directions(NAMES, TEMPLATES)
    assert len(counted) == 1


@pytest.mark.parametrize("damage", ["cut short", "one bit", "something else"])
def test_a_damaged_cache_entry_is_made_again(clip, head_cache, counted, damage):
    head = clip.directions(NAMES, TEMPLATES)
    (entry,) = head_cache.iterdir()
    data = bytearray(entry.read_bytes())
    data[-3] ^= 1
    entry.write_bytes({"cut short": data[:-9], "one bit": data, "something else": b"hello"}[damage])
    torch.testing.assert_close(clip.directions(NAMES, TEMPLATES), head, atol=0, rtol=0)
    assert len(counted) == 2
    clip.directions(NAMES, TEMPLATES)
    assert len(counted) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(clip, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SUTURE_CACHE", str(tmp_path / "file"))
    assert clip.directions(NAMES, TEMPLATES).shape == (3, 8)
    assert "The head is not cached" in caplog.text


def test_a_task_goes_from_disk_to_an_accuracy(clip, tmp_path):
    for name in NAMES:
        folder = tmp_path / "pets" / "test" / name
        folder.mkdir(parents=True)
        Image.fromarray(noise(1, 20, 24)[0]).save(folder / "0.png")
    inputs = task_inputs(clip, Task("pets", str(tmp_path / "pets"), NAMES, TEMPLATES))
    assert inputs.inputs.shape == (3, 3, SIDE, SIDE)
    # The three pictures are the same, so exactly one label is right.
    assert evaluate(clip.encoder(), inputs).value == pytest.approx(1 / 3)


def test_a_saved_model_loads_in_transformers_with_nothing_of_ours(clip, tmp_path):
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    state = drifted(clip.weights)
    clip.save(state, tmp_path / "merged")
    model = CLIPModel.from_pretrained(tmp_path / "merged").eval()
    pixels = clip.preprocess(images(noise()))
    with torch.inference_mode():
        features = model.get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(clip.encoder(state)(pixels), features, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.logit_scale.data, clip.weights["logit_scale"])
    assert CLIPImageProcessorPil.from_pretrained(tmp_path / "merged").crop_size["height"] == SIDE
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")("a cat")["input_ids"]) == 6


def test_the_whole_state_keeps_the_base_s_names_and_dtypes(directory):
    weights = {name: tensor.half() for name, tensor in load_file(directory / "model.safetensors").items()}
    tensors = Clip(directory, weights).full_state({"pre_layrnorm.bias": torch.ones(16)})
    assert tensors.keys() == weights.keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert tensors["vision_model.pre_layrnorm.bias"].tolist() == [1] * 16
    assert weights["vision_model.pre_layrnorm.bias"].tolist() == [0] * 16


def test_a_state_that_is_not_the_base_s_is_not_saved(clip, tmp_path):
    with pytest.raises(CheckpointError, match="is in the merged model but not in"):
        clip.save({"vision_model.adapter.bias": torch.zeros(3)}, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"has shape \(3,\) but \(16,\) in the pretrained model"):
        clip.save({"vision_model.pre_layrnorm.bias": torch.zeros(3)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_companion_files_are_the_configuration_tokenizer_and_processor(directory):
    names = {path.name for path in companion_files(directory)}
    assert names == {"config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_model_of_another_kind_is_refused_in_one_line(directory, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json' cannot be read .* wanted a CLIPModel directory"):
        _ = Clip(tmp_path, {}).config
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    with pytest.raises(CheckpointError, match="a model of type 'clip_vision_model', wanted 'clip'"):
        _ = Clip(tmp_path, {}).config


def test_missing_parts_of_the_pretrained_model_are_named(clip, directory, tmp_path):
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    bare = Clip(tmp_path, clip.weights)
    with pytest.raises(CheckpointError, match=r"no usable preprocessor_config\.json or processor_config\.json"):
        bare.decode(images(noise()))
    with pytest.raises(CheckpointError, match=r"no usable tokenizer\.json, or vocab\.json and merges\.txt"):
        bare.directions(("never", "seen", "before"), TEMPLATES)
    vision = {name: tensor for name, tensor in clip.weights.items() if name.startswith("vision_model.")}
    with pytest.raises(CheckpointError, match=r"'visual_projection\.weight' is missing from"):
        Clip(directory, vision).encoder()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"vocab_size": 40}, "has 56 tokens but the text tower 40; they belong to different models"),
        ({"vocab_size": 56, "eos_token_id": 7}, "ends texts with token 55 but the text tower looks for 7"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(tmp_path, setting, message):
    directory = save_tiny_clip(tmp_path / "clip")
    edit_json(directory / "config.json", text_config=setting)
    with pytest.raises(CheckpointError, match=message):
        _ = Clip(directory, {}).tokenizer


def test_a_configuration_that_makes_no_sense_is_refused_in_one_line(tmp_path):
    edit = {"model_type": "clip", "vision_config": {"hidden_size": 16, "num_attention_heads": 3}}
    (tmp_path / "config.json").write_text(json.dumps(edit))
    with pytest.raises(CheckpointError, match=r"config\.json' describes no valid CLIP: ") as refusal:
        _ = Clip(tmp_path, {}).config
    assert "\n" not in str(refusal.value)


def test_a_processor_of_another_size_than_the_tower_s_is_refused(tmp_path):
    directory = save_tiny_clip(tmp_path / "clip")
    edit_json(directory / "config.json", vision_config={"image_size": 32})
    with pytest.raises(CheckpointError, match=r"makes images of shape \(3, 16, 16\), the model wants"):
        Clip(directory, {}).decode(images(noise()))


def test_evaluation_imports_neither_transformers_nor_an_image_library():
    heavy = "transformers", "PIL", "hydra", "matplotlib"
    code = f"import sys, suture.evaluation; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_nothing_is_printed_and_transformers_keeps_its_settings(clip, capfd):
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    clip.encoder()
    clip.decode(images(noise()))
    clip.directions(("quiet", "loud"), TEMPLATES)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)
    assert capfd.readouterr() == ("", "")


def test_the_encoder_is_frozen_and_in_evaluation_mode(clip):
    encoder = clip.encoder()
    assert isinstance(encoder, Encoder)
    assert isinstance(encoder, nn.Module)
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())


def test_an_installed_package_can_bring_a_family(monkeypatch):
    from importlib.metadata import EntryPoint, EntryPoints

    entry = EntryPoint("letters", "suture.families.clip:FAMILY", "suture.families")
    monkeypatch.setattr("suture.families.entry_points", lambda group: EntryPoints([entry]).select(group=group))
    assert "letters" in families()
    assert family("letters") is Clip
