"""The options of AdaMerging and their defaults, from the paper where it gives them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le

from suture.adaptation.objectives import Objective
from suture.errors import ConfigError, check_known
from suture.merging.methods.ties_merging import THRESHOLD


@dataclass(frozen=True, kw_only=True)
class AdaMergingOptions:
    """Options of the loop that learns coefficients. https://arxiv.org/abs/2310.02575

    - `granularity`: see `layout`; `init_values`: see `initial_values`; `objective`: see `OBJECTIVES`.
    - `optimizer` (adam, adamw or sgd), `lr`, `weight_decay`, `schedule`: see `suture.adaptation.schedules`.
    - `max_steps`: by default 1,000, as published, or 200 with `schedule="fast"`. With 0 the models are merged with
      `init_values`.
    - `clamp_weights` limits coefficients to [0, 1]; `softmax` normalises them over tasks.
    - `concatenate`: all tasks in one forward and backward pass; by default where this is exact, but on a CPU only for
      networks below ten million parameters. `micro_batch` limits the inputs of one pass.
    - `plus_plus` uses task vectors trimmed by TIES to `threshold` %, with only the entries of the elected sign.
    - `rank_share` (AdaRank, https://arxiv.org/abs/2503.22178): the singular components of matrices get learned masks,
      of which the first ⌊share · k⌋ of k start on; `rank_temperature` is that of the masks' gradient. `centred` takes
      task vectors from the models' mean. AdaRank has 0.16, centred and init_values=2.3 for eight tasks.
    - `vectors_dtype`: the dtype of task vectors in memory; with `stream_vectors` they are read twice per step instead.
    - `capture`: on a GPU a step is recorded as a CUDA graph, where it can be, and replayed; needs more memory.
    - `recompute`: layers keep only their inputs and run again in the backward pass: less memory, a third more time.
    """

    granularity: str | Sequence[str] | Mapping[str, str] = "layer"
    objective: str | Objective = "entropy"
    optimizer: str = "adam"
    lr: Annotated[float, Gt(0)] = 1e-3
    weight_decay: Annotated[float, Ge(0)] = 0.0
    init_values: Any = 0.3
    clamp_weights: bool = False
    softmax: bool = False
    schedule: str = "constant"
    max_steps: Annotated[int, Ge(0)] | None = None
    concatenate: bool | None = None
    micro_batch: Annotated[int, Ge(1)] | None = None
    plus_plus: bool = False
    threshold: Annotated[float, Gt(0), Le(100)] = THRESHOLD
    rank_share: Annotated[float, Gt(0), Le(1)] | None = None
    rank_temperature: Annotated[float, Gt(0)] = 10.0
    centred: bool = False
    vectors_dtype: torch.dtype | None = None
    stream_vectors: bool = False
    recompute: bool = False
    capture: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "AdaMergingOptions":
        """Options by name; raises `ConfigError` for an unknown one."""
        known = [each.name for each in fields(cls)]
        check_known("option of adapt", values, known)
        chosen = cls(**values)
        for name in ("plus_plus", "stream_vectors", "vectors_dtype"):
            if chosen.rank_share is not None and getattr(chosen, name):
                raise ConfigError(
                    f"rank_share={chosen.rank_share} with {name}: wanted one of them. Remedy: leave one out."
                )
        return chosen
