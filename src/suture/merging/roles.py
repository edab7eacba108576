"""Roles: which tensors of a model are matrices, for methods that work on whole matrices.

A tensor's role follows from its module where one is given, else from its name and shape:

    matrix   the weight of a linear layer
    conv     the kernel of a convolution: a matrix (out, in · height · width)
    stack    the weights of fused experts: one matrix each
    vector   all else: biases, norms, scales, tokens, embeddings, positions, heads, and kernels that read the raw input
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from suture.checkpoints import TensorSpec
from suture.errors import ConfigError

_RAW_INPUT = 4  # channels: a kernel that reads no more is a stem or a patch embedding
_CONV_1D = 16  # the longest kernel of a 3-D tensor that is not named a convolution
_ROWS_OF_CONV1D = {"c_attn", "c_fc", "c_proj", "q_attn"}  # GPT-2's layers, which some libraries store as (in, out)
_STEMS = re.compile(r"stem|patch|embed|(^|\.)conv1\.|(^|\.)features\.0\.")
_TABLES = re.compile(
    r"embed|pos_|_pos$|position|relative_attention_bias|^(wte|wpe|shared|A_log)$|(cls|class|mask|register)_?tokens?$"
)
_HEADS = {"classifier", "classification_head", "head", "heads", "lm_head", "predictions", "qa_outputs", "score"}
_TOP_HEADS = re.compile(r"(model\.)?(output|fc|decoder)\.weight")
_NO_MATRIX = re.compile(r"(bias|norm|scale|scales)$")


Options = TypeVar("Options", bound="RoleOptions")


@dataclass(frozen=True, kw_only=True)
class RoleOptions:
    """The knobs that change roles.

    - `as_matrix`, `as_vector`: patterns of names (* stands for anything) for tensors whose name or shape misleads.
    - `split`: pattern → the number of equal parts, or the rows of each part, of tensors that hold several matrices
      above one another, such as q, k and v. Rows that add up to less than the tensor's repeat: one group a head.
    """

    as_matrix: Sequence[str] = ()
    as_vector: Sequence[str] = ()
    split: Mapping[str, int | Sequence[int]] | None = None

    @classmethod
    def of(cls: type[Options], knobs: Mapping[str, Any]) -> Options:
        """Those among some knobs."""
        return cls(**{field.name: knobs[field.name] for field in fields(cls) if field.name in knobs})


@dataclass(frozen=True, kw_only=True)
class MatrixOptions(RoleOptions):
    """The knobs that all methods on whole matrices share.

    - `alpha`: the factor of the whole update.
    - `vectors`: tensors that are no matrices take the mean of the task vectors, or stay at the base.
    - `remove_keys`: tensors that stay at the base.
    """

    alpha: float = 1.0
    vectors: Literal["mean", "base"] = "mean"
    remove_keys: Sequence[str] = ()


class Role(NamedTuple):
    """The role of a tensor: `count` matrices of (rows, columns) as they are stored, one after another.

    `transposed`: they are stored as (in, out). `parts`: the rows of each part that is a matrix of its own.
    """

    kind: Literal["matrix", "conv", "stack", "vector"]
    count: int = 1
    rows: int = 0
    columns: int = 0
    transposed: bool = False
    parts: Sequence[int] = ()

    def matrices(self, flat: Float[Tensor, "*batch entry"]) -> Float[Tensor, "*batch out inner"]:
        """One of the matrices, from its entries in their order in the file, as (out, in): a view."""
        stored = flat.unflatten(-1, (self.rows, self.columns))
        return stored.mT if self.transposed else stored

    def blocks(self, matrix: Float[Tensor, "*batch out inner"]) -> Iterator[Float[Tensor, "*batch part inner"]]:
        """The parts of a matrix (of several, or of their update), each as a matrix."""
        if not self.parts:
            yield matrix
            return
        groups = matrix.unflatten(-2, (-1, sum(self.parts)))
        for part in groups.split(list(self.parts), -2):
            yield part.flatten(-3, -2)

    def joined(self, blocks: Sequence[Tensor]) -> Float[Tensor, " entry"]:
        """The entries in their order in the file, of a matrix in `blocks`, each (part, in)."""
        matrix = blocks[0]
        if self.parts:
            groups = [block.unflatten(0, (-1, rows)) for block, rows in zip(blocks, self.parts, strict=True)]
            matrix = groups[0].new_empty(len(groups[0]), sum(self.parts), groups[0].shape[-1])
            for target, group in zip(matrix.split(list(self.parts), 1), groups, strict=True):
                target.copy_(group)
            matrix = matrix.flatten(0, 1)
        return (matrix.mT if self.transposed else matrix).reshape(-1)


VECTOR = Role("vector")


@dataclass(frozen=True)
class Roles:
    """The roles of a model's tensors; `module` is the model itself, where there is one."""

    specs: Mapping[str, TensorSpec]
    module: nn.Module | None = None

    def of(self, name: str, options: RoleOptions | None = None) -> Role:
        """The role of one tensor; raises `ConfigError` for options that do not fit it."""
        options = options or RoleOptions()
        if _matches(name, options.as_vector):
            return VECTOR
        forced = _matches(name, options.as_matrix)
        role = self._role(name, forced)
        if forced and role.kind == "vector":
            raise ConfigError(f"method.as_matrix names '{name}', which has fewer than two axes. Remedy: leave it out.")
        for pattern, parts in (options.split or {}).items():
            if fnmatchcase(name, pattern) and role.kind != "vector":
                return role._replace(parts=_parts(name, role, parts))
        return role

    def check(self, options: RoleOptions) -> None:
        """Refuse patterns that fit no tensor (`ConfigError`)."""
        for knob in ("as_matrix", "as_vector", "split"):
            for pattern in getattr(options, knob) or ():
                if not any(fnmatchcase(name, pattern) for name in self.specs):
                    raise ConfigError(
                        f"method.{knob} has '{pattern}', which is the name of no tensor. "
                        "Remedy: give names, or patterns such as *.attn.*"
                    )

    def _role(self, name: str, forced: bool) -> Role:
        shape = self.specs[name].shape
        if len(shape) < 2 or not math.prod(shape):
            return VECTOR
        layer = self._modules.get(name.rpartition(".")[0])
        if not forced and (_known_vector(layer, name, shape) if layer is not None else _vector_by_name(name, shape)):
            return VECTOR
        if len(shape) == 2:
            return Role("matrix", 1, *shape, transposed=self._stores_in_first(name, layer))
        if len(shape) == 3 and not _is_conv1d(name, shape, layer):
            return Role("stack", *shape, transposed=self._stacks_in_first(name))
        return Role("conv", 1, shape[0], math.prod(shape[1:]))

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.module.named_modules()) if self.module is not None else {}

    def _stores_in_first(self, name: str, layer: nn.Module | None) -> bool:
        """Whether a 2-D weight is stored as (in, out), as GPT-2's Conv1D and open_clip's bare projections are."""
        if layer is not None and name.endswith(".weight"):
            return type(layer).__name__ == "Conv1D"
        owner = _owner(name)
        return (owner in _ROWS_OF_CONV1D and self._has_conv1d) or name.rpartition(".")[2] in ("proj", "text_projection")

    @cached_property
    def _has_conv1d(self) -> bool:
        """Whether a bias shows that GPT-2's layers are stored as (in, out)."""
        for name, spec in self.specs.items():
            if _owner(name) in _ROWS_OF_CONV1D and name.endswith(".weight") and len(spec.shape) == 2:
                bias = self.specs.get(f"{name.removesuffix('weight')}bias")
                if bias is not None and spec.shape[0] != spec.shape[1] == math.prod(bias.shape):
                    return True
        return False

    def _stacks_in_first(self, name: str) -> bool:
        """Whether experts are stored as (expert, in, out): gate_up_proj is as wide as twice the rows of down_proj."""
        up, down = (
            self._shape_of(re.sub("gate_up_proj|down_proj", each, name)) for each in ("gate_up_proj", "down_proj")
        )
        return up is not None and down is not None and up[2] == 2 * down[1] and up[1] == down[2]

    def _shape_of(self, name: str) -> Sequence[int] | None:
        spec = self.specs.get(name)
        return spec.shape if spec is not None and len(spec.shape) == 3 else None


def tensor_roles(specs: Mapping[str, TensorSpec], module: nn.Module | None = None, **options: Any) -> dict[str, Role]:
    """The role of every floating-point tensor, by name; `options` are those of `RoleOptions`.

    >>> import torch
    >>> from suture.checkpoints import open_checkpoint
    >>> model = open_checkpoint({"fc1.weight": torch.zeros(6, 4), "fc1.bias": torch.zeros(6)})
    >>> {name: role.kind for name, role in tensor_roles(model.specs).items()}
    {'fc1.bias': 'vector', 'fc1.weight': 'matrix'}
    """
    roles, chosen = Roles(specs, module), RoleOptions(**options)
    roles.check(chosen)
    return {name: roles.of(name, chosen) for name, spec in sorted(specs.items()) if spec.dtype.is_floating_point}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _owner(name: str) -> str:
    """The module that a tensor belongs to, or the name of a parameter that is not called weight."""
    parts = name.split(".")
    return parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]


def _known_vector(layer: nn.Module, name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of a known layer is no matrix."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return name.endswith("bias") or (layer.groups == 1 and layer.in_channels <= _RAW_INPUT)
    if isinstance(layer, nn.Linear | nn.MultiheadAttention) or type(layer).__name__ == "Conv1D":
        return name.endswith("bias") or _is_head(name)
    return isinstance(layer, nn.Embedding) or _vector_by_name(name, shape)


def _vector_by_name(name: str, shape: Sequence[int]) -> bool:
    owner = _owner(name)
    if _TABLES.search(owner) or _NO_MATRIX.search(name.rpartition(".")[2]) or "norm" in owner or _is_head(name):
        return True
    if len(shape) == 3 and shape[0] == 1:
        return True  # one position or token for all
    is_kernel = len(shape) > 3 or (len(shape) == 3 and _is_conv1d(name, shape, None))
    depthwise = shape[1] == 1 and shape[0] > 1 and not _STEMS.search(name)
    return is_kernel and shape[1] <= _RAW_INPUT and not depthwise


def _is_head(name: str) -> bool:
    return bool(_HEADS & set(name.split("."))) or _TOP_HEADS.fullmatch(name) is not None


def _is_conv1d(name: str, shape: Sequence[int], layer: nn.Module | None) -> bool:
    if layer is not None:
        return isinstance(layer, nn.modules.conv._ConvNd)
    return "expert" not in name and ("conv" in name or shape[2] <= _CONV_1D)


def _parts(name: str, role: Role, parts: int | Sequence[int]) -> Sequence[int]:
    """The rows of each part; raises `ConfigError` unless the tensor's rows are a multiple of them."""
    rows = role.columns if role.transposed else role.rows
    whole = parts if isinstance(parts, int) else sum(parts)
    if whole < 1 or rows % whole or (not isinstance(parts, int) and min(parts) < 1):
        raise ConfigError(
            f"method.split={parts} does not fit the {rows} rows of '{name}'. "
            "Remedy: give a number of equal parts, or the rows of each."
        )
    return (rows // parts,) * parts if isinstance(parts, int) else tuple(parts)
