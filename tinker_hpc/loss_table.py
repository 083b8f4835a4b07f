"""The published losses: what each needs. Client side and worker agree on this table and on nothing else.

All are token-level and are summed over tokens and datums; the shift is the caller's
(model_input = tokens[:-1], target_tokens = tokens[1:]). Formulas: tinker-cookbook, docs/losses.mdx; gspo and today's
cispo defaults: tinker-docs.thinkingmachines.ai/tinker/losses.
The functions themselves live in `tinker_hpc/worker/losses.py`; a test there checks that its registry holds exactly
the losses of this table.
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
        optional: keys a datum may have besides; a clip input, one bound per token, replaces the bound of the config.
        config: allowed keys of loss_fn_config (numbers), each with its default.
        several_targets: whether all inputs may be [N, K] instead: K weighted targets a position.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    config: Mapping[str, float] = field(default_factory=dict)
    several_targets: bool = False


_POLICY = ("target_tokens", "logprobs", "advantages")
CLIP_BOUNDS = ("clip_low_threshold", "clip_high_threshold")
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

KNOWN_LOSSES: Mapping[str, LossDeclaration] = MappingProxyType(
    {
        "cross_entropy": LossDeclaration(required=("target_tokens", "weights"), several_targets=True),
        "importance_sampling": LossDeclaration(required=_POLICY),
        "ppo": LossDeclaration(required=_POLICY, optional=CLIP_BOUNDS, config=_CLIP),
        # 0.8 and 1.2 in older documents; one-sided in today's.
        "cispo": LossDeclaration(
            required=_POLICY,
            optional=CLIP_BOUNDS,
            config={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
        ),
        "dro": LossDeclaration(required=_POLICY, config={"beta": 0.05}),
        "gspo": LossDeclaration(required=(*_POLICY, "sequence_ratio_mask"), optional=CLIP_BOUNDS, config=_CLIP),
    }
)
