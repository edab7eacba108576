"""CLIP's weights under the names of open_clip and under those of transformers: the same numbers, laid out differently.

open_clip keeps queries, keys and values in one matrix and multiplies with its projections from the right.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_TOWERS = {"visual.": "vision_model.", "": "text_model."}
_BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_WHOLE = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_TURNED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_PARTS = ("q_proj", "k_proj", "v_proj")
_OPEN_CLIP = re.compile(r"(?P<tower>visual\.|)transformer\.resblocks\.(?P<block>\d+)\.(?P<rest>.+)")
_TRANSFORMERS = re.compile(r"(?P<tower>vision_model\.|text_model\.)encoder\.layers\.(?P<block>\d+)\.(?P<rest>.+)")


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip state dict (whole, or its vision tower) under the names of a CLIPModel; other names are left out.

    >>> sorted(to_transformers({"visual.ln_pre.bias": torch.ones(2), "visual.proj": torch.ones(2, 3)}))
    ['vision_model.pre_layrnorm.bias', 'visual_projection.weight']
    """
    result = {}
    for name, tensor in tensors.items():
        if match := _OPEN_CLIP.fullmatch(name):
            place = f"{_TOWERS[match['tower']]}encoder.layers.{match['block']}."
            result |= _split(place, match["rest"], tensor)
        elif name in _WHOLE:
            result[_WHOLE[name]] = tensor
        elif name in _TURNED:
            result[_TURNED[name]] = tensor.T.contiguous()
    return result


def to_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPModel's state dict under the names of open_clip; the inverse of `to_transformers`."""
    whole, turned = ({new: old for old, new in table.items()} for table in (_WHOLE, _TURNED))
    block = {new: old for old, new in _BLOCK.items()}
    towers = {new: old for old, new in _TOWERS.items()}
    result = {}
    for name, tensor in tensors.items():
        if match := _TRANSFORMERS.fullmatch(name):
            place = f"{towers[match['tower']]}transformer.resblocks.{match['block']}."
            module, _, kind = match["rest"].rpartition(".")
            if module.startswith("self_attn.") and module.endswith(_PARTS):
                source = name.removesuffix(match["rest"])
                rows = [tensors[f"{source}self_attn.{part}.{kind}"] for part in _PARTS]
                result[f"{place}attn.in_proj_{kind}"] = torch.cat(rows)
            else:
                result[f"{place}{block[module + '.']}{kind}"] = tensor
        elif name in whole:
            result[whole[name]] = tensor
        elif name in turned:
            result[turned[name]] = tensor.T.contiguous()
    return result


def _split(place: str, rest: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of an open_clip block: three where queries, keys and values are kept together."""
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        rows = tensor.chunk(3)
        return {f"{place}self_attn.{part}.{kind}": row for part, row in zip(_PARTS, rows, strict=True)}
    module, _, kind = rest.rpartition(".")
    return {f"{place}{_BLOCK[module + '.']}{kind}": tensor}
