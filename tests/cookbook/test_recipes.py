"""tinker-cookbook's recipes, unmodified, end to end on CPU: one line each. docs/cookbook.md has the table for people.

A line names the module started with `python -m`, what is set on its command line (sizes, so that it is short; nothing
about where it runs), how many steps its own metrics must show, and one metric that must be a number in each of them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from recipe_runner import RECIPES, STUDENT, TEACHER, Line, Place, start

PROGRAMS = Path(__file__).resolve().parent / "programs"


MATH = "env=arithmetic group_size=4 groups_per_batch=8 max_tokens=8"
GAME = "batch_size=2 max_tokens=4 eval_every=0 max_steps=1"
DISTIL = "group_size=2 max_tokens=8 max_steps=1 lora_rank=8"
REWARD = "env/all/reward/total"

LINES = [
    Line("sl_loop", "sl_loop", "batch_size=8 max_steps=3 save_every=2", "train_mean_nll", 3),
    Line("sl_basic", "sl_basic", "max_steps=1 eval_every=1", "test/nll"),
    Line("chat_sl", "chat_sl.train", "batch_size=8 max_steps=2 eval_every=1", "test/nll", 2),
    Line("rl_loop", "rl_loop", "batch_size=4 group_size=4 max_tokens=8 max_steps=2", "reward/total", 2),
    Line("rl_basic", "rl_basic", "max_tokens=4 max_steps=1", REWARD),
    Line("math_rl sync", "math_rl.train", f"{MATH} max_steps=2", REWARD, 2),
    Line("math_rl async", "math_rl.train", f"{MATH} max_steps=3 max_steps_off_policy=1", REWARD, 2, or_one_more=True),
    Line(
        "math_rl streamed",
        "math_rl.train",
        f"{MATH} max_steps=2 stream_minibatch_config.num_minibatches=2 stream_minibatch_config.groups_per_batch=8",
        REWARD,
        2,
    ),
    Line("math_rl ppo", "math_rl.train", f"{MATH} max_steps=1 loss_fn=ppo num_substeps=2", REWARD),
    Line("preference dpo", "preference.dpo.train", "batch_size=8 max_steps=2", "margin", 2),
    Line("preference shorter", "preference.shorter.train", f"{GAME} group_size=2", REWARD, model=TEACHER),
    Line("guess_number", "multiplayer_rl.guess_number.train", f"{GAME} group_size=2", REWARD, model=TEACHER),
    Line("twenty_questions", "multiplayer_rl.twenty_questions.train", f"{GAME} group_size=2", REWARD, model=TEACHER),
    Line(
        "text_arena",
        "multiplayer_rl.text_arena.train",
        f"{GAME} num_train_datapoints=2 num_test_datapoints=2",
        REWARD,
        model=TEACHER,
    ),
    Line(
        "rubric",
        "rubric.train",
        "train_group_size=2 groups_per_batch=2 max_tokens=8 max_steps=1 eval_every=0 "
        f"grader_llm_name={TEACHER} train_jsonl_path=rubric/example_rubric_train.jsonl "
        "test_jsonl_path=rubric/example_rubric_test.jsonl",
        REWARD,
        model=TEACHER,
    ),
    Line(
        "prompt_distillation",
        "prompt_distillation.train",
        "file_path=languages.jsonl batch_size=4 max_steps=2 renderer_name=qwen3",
        "train_mean_nll",
        2,
    ),
    Line(
        "on-policy distillation",
        "distillation.on_policy_distillation",
        f"teacher_model={TEACHER} dataset=deepmath groups_per_batch=2 {DISTIL}",
        "teacher_kl",
    ),
    Line(
        "multi-teacher distillation",
        "distillation.on_policy_multi_teacher",
        f"deepmath_teacher_model={TEACHER} tulu3_teacher_model={STUDENT} "
        f"deepmath_groups_per_batch=2 tulu3_groups_per_batch=2 {DISTIL}",
        "teacher_kl/dataset_1",
    ),
]


@pytest.fixture(scope="session", autouse=True)
def own_data(served: Place) -> None:
    """The recipes whose data comes from a generator of the cookbook, or from the user."""
    (served.working_folder / "rubric").mkdir()
    served.python(
        "-c",
        f"from {RECIPES}.rubric.generate_data import generate_dataset; generate_dataset(4, 2, 42, 'rubric/')",
    )
    words = {"guten Morgen": "de", "bonjour": "fr", "good morning": "en", "buenos dias": "es"}
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": code}]}
            for text, code in words.items()]  # fmt: skip
    (served.working_folder / "languages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))


@pytest.mark.parametrize("line", LINES, ids=str)
def test_recipe(served: Place, line: Line) -> None:
    start(served, line)
    name = line.name.replace(" ", "-")
    rows = [row for row in served.metrics(name) if line.metric in row]
    assert len(rows) - line.num_steps in range(1 + line.or_one_more), f"{line.metric} in {served.metrics(name)}"
    assert all(math.isfinite(row[line.metric]) for row in rows)
    saved = [json.loads(text) for text in (served.log_path(name) / "checkpoints.jsonl").read_text().splitlines()]
    assert saved[-1]["name"] == "final"
    assert (served.checkpoint(saved[-1]["state_path"]) / "adapter_model.safetensors").exists()


def test_resumes_from_its_own_checkpoints(served: Place) -> None:
    """chat_sl stopped after two steps and started again with the same log folder goes on with the third."""
    line = Line("resume", "chat_sl.train", "batch_size=8 save_every=1", "train_mean_nll")
    start(served, line, "max_steps=2")
    assert [row["step"] for row in served.metrics("resume")] == [0, 1]
    (served.log_path("resume") / "checkpoints.jsonl").write_text(
        "".join(
            text + "\n"
            for text in (served.log_path("resume") / "checkpoints.jsonl").read_text().splitlines()
            if json.loads(text)["name"] != "final"  # as if it had been killed, not finished
        )
    )
    printed = start(served, line, "max_steps=4")
    assert "esum" in printed
    steps = [row["step"] for row in served.metrics("resume")]
    assert steps[-1] == 3 and steps.count(0) == 1


def test_rlhf_pipeline(served: Place) -> None:
    """Three stages in one program: SFT, a reward model, RL against it from the first two's checkpoints."""
    served.python(
        "-m",
        f"{RECIPES}.preference.rlhf.rlhf_pipeline",
        *f"base_model={STUDENT} short_name=tiny lora_rank=8 batch_size=8 max_steps=1 rl_max_tokens=8".split(),
        "rl_group_size=2",
        "eval_every=0",
    )


def test_inspect_evaluation(served: Place) -> None:
    """The evaluator for inspect-ai, with a second base model as judge; the task is the cookbook's own example."""
    printed = served.python(
        "-m",
        "tinker_cookbook.eval.run_inspect_evals",
        f"model_name={TEACHER}",
        "renderer_name=qwen3_5_disable_thinking",
        "tasks=tinker_cookbook.eval.custom_inspect_task:example_lm_as_judge",
        "max_tokens=8",
    )
    assert "Inspect evaluation completed" in printed and "accuracy" in printed


def test_prompt_distillation_data(served: Place) -> None:
    """The generator of prompt distillation's data: long prompts to a teacher, here for two sentences."""
    folder = served.working_folder / "tinker_cookbook" / "example_data"
    folder.mkdir(parents=True)
    (folder / "multilingual.txt").write_text("guten Morgen, liebe Sonne\nbonjour tout le monde\n")
    try:
        served.python(
            "-m", f"{RECIPES}.prompt_distillation.create_data", f"output_file={served.root / 'distilled.jsonl'}"
        )
    finally:
        (folder / "multilingual.txt").unlink()
        folder.rmdir()
        folder.parent.rmdir()
    assert (served.root / "distilled.jsonl").exists()


def test_tool_use(served: Place) -> None:
    """The tool-use library with rl.train: a calculator as the tool, since the recipes' own tools need services."""
    printed = served.python(str(PROGRAMS / "tool_use.py"), TEACHER, str(served.log_path("tool_use")))
    assert math.isfinite(served.metrics("tool_use")[-1][REWARD]), printed
    assert "CALLS [[" in printed, f"the model called no tool: {printed[-3000:]}"
