"""Recipes of the cookbook that learn, not only run: DPO widens the margin, distillation lowers the KL to the teacher.

The curves in docs/learning.svg are of these tests: docs/draw_learning.py.
"""

from __future__ import annotations

import json

from curves import record
from recipe_runner import STUDENT, Line, Place, start

DPO = Line(
    "learning-dpo", "preference.dpo.train", "batch_size=16 max_steps=16 learning_rate=3e-3 lr_schedule=constant", ""
)
TEACH = Line(
    "learning-teacher",
    "chat_sl.train",
    "batch_size=16 num_epochs=3 learning_rate=2e-3 renderer_name=qwen3_instruct",
    "",
)
DISTIL = Line(
    "learning-distil",
    "distillation.on_policy_distillation",
    f"teacher_model={STUDENT} dataset=deepmath groups_per_batch=16 group_size=4 max_tokens=8 max_steps=12 "
    "lora_rank=32 learning_rate=1e-3 eval_every=0 save_every=0 renderer_name=qwen3_instruct",
    "",
)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_dpo_widens_the_margin(served: Place) -> None:
    """Right sums are preferred to ones that are ten too large."""
    start(served, DPO)
    margins = [row["margin"] for row in served.metrics(DPO.name)]
    print("margin", [round(margin, 3) for margin in margins])
    record("dpo", "DPO: right sums preferred (cookbook)", "margin of the rewards", margins)
    assert abs(margins[0]) < 1e-3, "policy and reference are the same model before the first step"
    assert mean(margins[-3:]) > 0.15


def test_distillation_lowers_the_kl_to_the_teacher(served: Place) -> None:
    """The teacher is the student's own base, fine-tuned on right sums; the student learns from its words alone."""
    start(served, TEACH)
    saved = [json.loads(text) for text in (served.log_path(TEACH.name) / "checkpoints.jsonl").read_text().splitlines()]
    start(served, DISTIL, f"teacher_checkpoint={saved[-1]['sampler_path']}")
    kls = [row["teacher_kl"] for row in served.metrics(DISTIL.name)]
    print("KL to the teacher", [round(kl, 3) for kl in kls])
    record("distillation", "on-policy distillation (cookbook)", "KL to the teacher, nats", kls)
    assert mean(kls[-3:]) < 0.6 * mean(kls[:2])
