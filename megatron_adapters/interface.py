"""What goes into the engine and comes out of it: plain Python and numpy, equal on every rank.

Legend of the shape suffixes used in this package:
  T tokens of a packed micro-batch, N tokens of one datum, D hidden size, V vocabulary, R rank, O outputs, I inputs.
  Suffixes are logical sizes; under tensor parallelism a rank may hold a part of them, which the docstring then says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

Choices = npt.NDArray[np.uint8 | np.int16]
"""[.., M, K]: the experts that tokens go through, in each of the M layers that have experts, best first. uint8 where
there are at most 256 experts, else int16."""


@dataclass(frozen=True)
class Layout:
    """How the ranks share the work. world_size = tp_size * dp_size * pp_size; sequence parallel where tp_size > 1.

    Experts are spread over the ranks of one pipeline stage whatever its TP and DP: ep_size divides tp_size * dp_size,
    and an expert is never split further (megatron-core's expert tensor parallelism is 1).
    """

    tp_size: int = 1
    """Ranks that split every weight matrix; consecutive ranks, best on one node."""
    dp_size: int = 1
    """Copies of all but the experts, each working on its own part of a batch."""
    pp_size: int = 1
    """Stages that hold consecutive layers each."""
    ep_size: int = 1
    """Ranks of a stage that share its experts out among them."""

    @property
    def world_size(self) -> int:
        return self.tp_size * self.dp_size * self.pp_size

    @property
    def expert_copies(self) -> int:
        """Ranks of a stage that hold the same experts."""
        return self.tp_size * self.dp_size // self.ep_size

    @property
    def experts_span_copies(self) -> bool:
        """Ranks of different data-parallel copies exchange tokens, so they must step together, data or not."""
        return self.tp_size % self.ep_size != 0

    @property
    def computes_together(self) -> bool:
        """Ranks exchange tensors in the middle of a pass, so one that leaves it leaves others in a collective."""
        return self.tp_size > 1 or self.pp_size > 1 or self.ep_size > 1


@dataclass(frozen=True)
class LoraSpec:
    """What to train. The scaling of the update is alpha / rank."""

    rank: int
    seed: int
    """Seed of the initial A matrices; B starts at zero. The same under every layout."""
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True
    alpha: float = 32.0
    per_expert: bool = False
    """Mixture of experts: A and B of its own for every expert, instead of sharing the factor on the hidden side."""


@dataclass(frozen=True)
class AdamParams:
    """AdamW with decoupled weight decay; defaults are Tinker's."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    """Largest global gradient norm; 0 means no clipping."""


@dataclass(frozen=True)
class Datum:
    """One sequence. `inputs` must hold `target_tokens` (int64 [N], or [N, K] for K targets a token); the other keys are
    the loss's own."""

    tokens: np.ndarray
    """int32 [N]"""
    inputs: Mapping[str, np.ndarray]
    """each [N, ...]"""
    experts: Choices | None = None
    """[N, M, K], the experts to go through in each of the M layers that have some; None: those the routers choose"""


@dataclass(frozen=True)
class PassOutput:
    """What a pass computed, in the order the data were given."""

    logprobs: list[np.ndarray]
    """one float32 array per datum in the shape of its targets: natural log of the probability of each"""
    loss_sum: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelInfo:
    """What a caller may want to know about the base model."""

    model_type: str
    vocab_size: int
    max_context: int
    num_layers: int
    hidden_size: int
    eos_token_ids: tuple[int, ...]
    num_experts: int = 0
    expert_layers: int = 0
    """how many have experts"""
    experts_per_token: int = 0


LossFn = Callable[[Tensor, Mapping[str, Tensor], Tensor], Tensor]
"""(logprobs_T float32, inputs_T by key, segment_ids_T int64) -> scalar: the SUM over the tokens of a micro-batch.
With K targets a token, logprobs are [T, K].

segment_ids_T numbers the sequences of the micro-batch from 0. How a batch is cut into micro-batches depends on the
layout, so a loss must be a sum over sequences.
"""


@dataclass(frozen=True)
class Pass:
    """One adapter's data and loss: the unit that counts wholly or not at all."""

    adapter_id: str
    data: Sequence[Datum]
    loss_fn: LossFn
