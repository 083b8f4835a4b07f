"""Recipes as a user starts them: `tinker-hpc run ... -- python -m tinker_cookbook.recipes...`, one job or two."""

from __future__ import annotations

import subprocess
import sys

from recipe_runner import PYTHON, RECIPES, STUDENT, TEACHER, Place


def run(place: Place, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tinker_hpc.cli", "run", *words],
        cwd=place.working_folder,
        env=place.environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_supervised_loop_in_a_run(place: Place) -> None:
    """The hub name, its tokenizer and its dataset all resolve in the job, by one line of configuration and a folder."""
    log_path = place.log_path("run-sl-loop")
    recipe = [str(PYTHON), "-m", f"{RECIPES}.sl_loop", f"model_name={STUDENT}", f"log_path={log_path}"]
    done = run(place, "--base-model", STUDENT, "--", *recipe, "batch_size=32", "learning_rate=1e-3")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    losses = [row["train_mean_nll"] for row in place.metrics("run-sl-loop")]
    print("NLL", losses)
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_distillation_in_a_run_with_two_base_models(place: Place) -> None:
    log_path = place.log_path("run-distillation")
    recipe = [str(PYTHON), "-m", f"{RECIPES}.distillation.on_policy_distillation"]
    options = (
        f"model_name={STUDENT} teacher_model={TEACHER} dataset=deepmath groups_per_batch=2 group_size=2 max_tokens=8"
    )
    done = run(
        place, "--base-model", STUDENT, "--base-model", TEACHER, "--", *recipe, *options.split(),
        "max_tokens=8", "max_steps=1", "lora_rank=8", f"log_path={log_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "teacher_kl" in place.metrics("run-distillation")[0]
