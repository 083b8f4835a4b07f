"""The published losses: what each needs. Client side and worker agree on this table and on nothing else.

All are token-level and are summed over tokens and datums; the shift is the caller's
(model_input = tokens[:-1], target_tokens = tokens[1:]). Formulas: tinker-cookbook, docs/losses.mdx.
The functions themselves live in `tinker_hpc/worker/losses.py`; a test there checks that its registry holds exactly
the losses with `offered=True` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# dtype of each input on the wire and in the log, by key.
INPUT_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "target_tokens": "int64",
        "weights": "float32",
        "logprobs": "float32",
        "advantages": "float32",
        "clip_low_threshold": "float32",
        "clip_high_threshold": "float32",
        "sequence_ratio_mask": "float32",
    }
)


@dataclass(frozen=True)
class LossDeclaration:
    """What a loss takes.

    Attributes:
        required: keys every datum must have in loss_fn_inputs, each [N] beside N tokens.
        optional: keys a datum may have besides.
        config: allowed keys of loss_fn_config (numbers), each with its default.
        offered: whether this version's worker computes it.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    config: Mapping[str, float] = field(default_factory=dict)
    offered: bool = False


_POLICY = ("target_tokens", "logprobs", "advantages")
_CLIP_INPUTS = ("clip_low_threshold", "clip_high_threshold")
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

KNOWN_LOSSES: Mapping[str, LossDeclaration] = MappingProxyType(
    {
        "cross_entropy": LossDeclaration(required=("target_tokens", "weights"), offered=True),
        "importance_sampling": LossDeclaration(required=_POLICY),
        "ppo": LossDeclaration(required=_POLICY, optional=_CLIP_INPUTS, config=_CLIP),
        "cispo": LossDeclaration(required=_POLICY, optional=_CLIP_INPUTS, config=_CLIP),
        "dro": LossDeclaration(required=_POLICY, config={"beta": 0.05}),
        "gspo": LossDeclaration(required=(*_POLICY, "sequence_ratio_mask"), optional=_CLIP_INPUTS, config=_CLIP),
    }
)


def offered_losses() -> tuple[str, ...]:
    """Names of the losses this version's worker computes."""
    return tuple(name for name, declaration in KNOWN_LOSSES.items() if declaration.offered)
