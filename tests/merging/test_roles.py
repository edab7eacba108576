"""The roles of tensors: by name and shape, by module, and by what was asked for."""

import pytest
import torch
from torch import nn

from suture import merge, open_checkpoint
from suture.errors import ConfigError
from suture.merging.roles import MatrixOptions, Roles, tensor_roles

HF, OPEN_CLIP = "vision_model.encoder.layers.0", "visual.transformer.resblocks.0"


def roles(shapes, module=None, **options):
    return tensor_roles(
        open_checkpoint({name: torch.zeros(shape) for name, shape in shapes.items()}).specs, module, **options
    )


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        (f"{HF}.self_attn.q_proj.weight", (8, 8), "matrix"),
        (f"{HF}.self_attn.q_proj.bias", (8,), "vector"),
        (f"{HF}.mlp.fc1.weight", (16, 8), "matrix"),
        (f"{OPEN_CLIP}.attn.in_proj_weight", (24, 8), "matrix"),
        ("visual_projection.weight", (6, 8), "matrix"),
        ("bert.encoder.layer.0.attention.output.dense.weight", (8, 8), "matrix"),
        ("unet.time_embedding.linear_1.weight", (8, 6), "matrix"),
        ("vision_model.embeddings.class_embedding", (8,), "vector"),
        ("vision_model.embeddings.position_embedding.weight", (17, 8), "vector"),
        ("visual.positional_embedding", (17, 8), "vector"),
        ("vit.pos_embed", (1, 17, 8), "vector"),
        ("vit.cls_token", (1, 1, 8), "vector"),
        ("transformer.wte.weight", (50, 8), "vector"),
        ("shared.weight", (50, 8), "vector"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4), "vector"),
        ("layers.0.relative_position_bias_table", (49, 4), "vector"),
        ("lm_head.weight", (50, 8), "vector"),
        ("cls.predictions.decoder.weight", (50, 8), "vector"),
        ("classifier.dense.weight", (8, 8), "vector"),
        ("model.output.weight", (50, 8), "vector"),
        ("fc.weight", (10, 8), "vector"),
        ("mixer.A_log", (8, 4), "vector"),
        ("experts.gate_up_proj_bias", (3, 8), "vector"),
        ("logit_scale", (), "vector"),
        ("vision_model.embeddings.patch_embedding.weight", (8, 3, 4, 4), "vector"),
        ("conv1.weight", (8, 1, 3, 3), "vector"),
        ("layer1.0.conv2.weight", (8, 8, 3, 3), "conv"),
        ("stages.0.blocks.0.conv_dw.weight", (8, 1, 7, 7), "conv"),
        ("mixer.conv1d.weight", (8, 1, 4), "conv"),
        ("audio.conv2.weight", (8, 8, 3), "conv"),
        ("layers.0.mlp.experts.gate_up_proj", (3, 8, 20), "stack"),
        ("layers.0.moe.w1", (3, 40, 20), "stack"),
    ],
)
def test_a_name_and_a_shape_decide(name, shape, kind):
    assert roles({name: shape})[name].kind == kind


def test_depthwise_kernels_are_matrices_of_the_kernel_s_size():
    role = roles({"block.dw.weight": (8, 1, 3, 3)})["block.dw.weight"]
    assert (role.rows, role.columns) == (8, 9)


def test_a_bias_shows_that_gpt2_stores_its_layers_as_in_by_out():
    gpt2 = {"h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_attn.bias": (24,), "h.0.attn.c_proj.weight": (8, 8)}
    found = roles(gpt2)
    assert found["h.0.attn.c_attn.weight"].transposed
    assert found["h.0.attn.c_proj.weight"].transposed
    linear = roles({**gpt2, "h.0.attn.c_attn.weight": (24, 8)})
    assert not any(role.transposed for role in linear.values())


def test_the_layout_of_fused_experts_follows_from_both_of_their_tensors():
    first_out = roles({"experts.gate_up_proj": (3, 20, 8), "experts.down_proj": (3, 8, 10)})
    assert not any(role.transposed for role in first_out.values())
    first_in = roles({"experts.gate_up_proj": (3, 8, 20), "experts.down_proj": (3, 10, 8)})
    assert all(role.transposed for role in first_in.values())
    assert all(role.count == 3 for role in first_in.values())


def test_a_module_knows_its_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(4, 6)  # a name that misleads
            self.table = nn.Embedding(9, 6)
            self.stem = nn.Conv2d(3, 8, 3)
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
            self.grouped = nn.Conv2d(8, 8, 3, groups=4)
            self.norm = nn.LayerNorm((3, 4))

    net = Net()
    found = {n: r.kind for n, r in tensor_roles(open_checkpoint(net).specs, net).items() if n.endswith("weight")}
    assert found == {
        "embed.weight": "matrix",
        "table.weight": "vector",
        "stem.weight": "vector",
        "depthwise.weight": "conv",
        "grouped.weight": "conv",
        "norm.weight": "vector",
    }
    tuned = [Net() for _ in range(2)]
    merged = merge(net, tuned, "iso_c")
    as_names_say = merge(dict(net.state_dict()), [dict(t.state_dict()) for t in tuned], "iso_c")
    assert not torch.equal(merged["embed.weight"], as_names_say["embed.weight"])
    torch.testing.assert_close(merged["table.weight"], (tuned[0].table.weight + tuned[1].table.weight).detach() / 2)


def test_a_role_can_be_asked_for():
    shapes = {"embed.weight": (9, 4), "a.weight": (4, 4), "stem.weight": (8, 3, 2, 2)}
    found = roles(shapes, as_matrix=["embed.*", "stem.weight"], as_vector=["a.*"])
    assert {name: role.kind for name, role in found.items()} == {
        "embed.weight": "matrix",
        "a.weight": "vector",
        "stem.weight": "conv",
    }


def test_parts_are_blocks_of_rows_and_come_back_together(generator):
    matrix = torch.randn(2, 12, 5, generator=generator)
    for parts, blocks in [
        (3, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        ([6, 4, 2], [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11]]),
        ([2, 1, 1], [[0, 1, 4, 5, 8, 9], [2, 6, 10], [3, 7, 11]]),  # a head at a time
    ]:
        role = roles({"qkv.weight": (12, 5)}, split={"qkv*": parts})["qkv.weight"]
        found = list(role.blocks(role.matrices(matrix.flatten(1))))
        assert all(torch.equal(block, matrix[:, rows]) for block, rows in zip(found, blocks, strict=True))
        assert torch.equal(role.joined([block[0] for block in found]), matrix[0].flatten())


def test_a_transposed_tensor_is_split_along_its_outputs(generator):
    stored = torch.randn(2, 5, 12, generator=generator)
    specs = open_checkpoint({"c_attn.weight": stored[0], "c_attn.bias": stored[0, 0]}).specs
    role = Roles(specs).of("c_attn.weight", MatrixOptions(split={"c_attn.weight": 3}))
    found = list(role.blocks(role.matrices(stored.flatten(1))))
    assert torch.equal(found[1], stored.mT[:, 4:8])
    assert torch.equal(role.joined([block[1] for block in found]), stored[1].flatten())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"as_vector": ["b.weight"]}, r"method.as_vector has 'b.weight', which is the name of no tensor"),
        ({"as_matrix": ["a.bias"]}, r"method.as_matrix names 'a.bias', which has fewer than two axes"),
        ({"split": {"a.weight": 5}}, r"method.split=5 does not fit the 12 rows of 'a.weight'. Remedy"),
        ({"split": {"a.weight": [7, 1]}}, r"method.split=\[7, 1\] does not fit the 12 rows"),
        ({"split": {"a.weight": [13, -1]}}, r"method.split=\[13, -1\] does not fit the 12 rows"),
        ({"split": {"a.weight": 0}}, r"method.split=0 does not fit"),
        ({"split": {"x": 3}}, r"method.split has 'x', which is the name of no tensor"),
        ({"vectors": "sum"}, r"method.vectors='sum' does not fit tsv_m"),
    ],
)
def test_options_that_fit_no_tensor_are_refused_in_one_line(options, message):
    base = {"a.weight": torch.zeros(12, 5), "a.bias": torch.zeros(12)}
    with pytest.raises(ConfigError, match=message) as caught:
        merge(base, [base], "tsv_m", **options)
    assert "\n" not in str(caught.value)
