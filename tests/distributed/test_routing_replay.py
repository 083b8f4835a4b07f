"""Routing replay: what is trained goes through the experts it was sampled with, and is what transformers computes with
its routers forced to them.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Job
from parity_reference import LINEARS, Reference, load_transformers, peft_on_parameters, sequences
from parity_table import BOUNDS
from peft_stacks import PeftParameters
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

JOBS = [Job("TP1", "routing_scenarios:both", family) for family in ("qwen3_moe", "gpt_oss")]
JOBS += [Job(layout, "routing_scenarios:both", "qwen3_moe") for layout in ("EP2", "TP2+EP2")]
JOBS += [Job("PP2", "routing_scenarios:both", "deepseek_v3")]  # a dense layer first: places are not layers
NEAR_TIES = [job for job in JOBS if job.family != "deepseek_v3"]
"""Where bfloat16 rounds the scores themselves: DeepSeek-V3's are float32, and few choices differ."""

Outcomes = Callable[[Job], dict[str, Any]]


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_the_trainer_takes_the_experts_of_the_sampler(job: Job, outcome_of: Outcomes) -> None:
    for dtype in ("float32", "bfloat16"):
        found = outcome_of(job)[dtype]
        for recorded, replayed in zip(found["recorded"], found["replayed"], strict=True):
            assert recorded.dtype == np.uint8 and recorded.max() > 0
            np.testing.assert_array_equal(replayed, recorded)


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_in_float32_it_changes_nothing(job: Job, outcome_of: Outcomes) -> None:
    """No rounding is large enough to choose another expert there."""
    found = outcome_of(job)["float32"]
    for recorded, own in zip(found["recorded"], found["own"], strict=True):
        np.testing.assert_array_equal(own, recorded)
    for with_replay, without in zip(found["replayed logprobs"], found["own logprobs"], strict=True):
        np.testing.assert_allclose(with_replay, without, atol=1e-6, rtol=0)
    for key, grad in found["own grads"].items():
        torch.testing.assert_close(found["replayed grads"][key], grad, rtol=0, atol=1e-6 * float(grad.abs().max()))


@pytest.mark.parametrize("job", NEAR_TIES, ids=str)
def test_in_bfloat16_the_trainer_comes_closer_to_the_sampler(job: Job, outcome_of: Outcomes) -> None:
    found = outcome_of(job)["bfloat16"]
    recorded, own = (np.concatenate(found[key]) for key in ("recorded", "own"))
    flipped = (np.sort(recorded, axis=-1) != np.sort(own, axis=-1)).any(axis=-1)
    assert flipped.any(), "no rounding chose another expert: this test would show nothing"
    sampled = np.concatenate(found["sampled"])
    gaps = {how: np.abs(np.concatenate(found[f"{how} logprobs"]) - sampled) for how in ("replayed", "own")}
    mean = {how: float(gap.mean()) for how, gap in gaps.items()}
    most = {how: float(gap.max()) for how, gap in gaps.items()}
    print(
        f"\nROUTING REPLAY {job} in bfloat16: {flipped.mean():.1%} of choices differ; trainer to sampler on average "
        f"{mean['own']:.4f} -> {mean['replayed']:.4f}, at most {most['own']:.3f} -> {most['replayed']:.3f} nats"
    )
    assert mean["replayed"] < 0.5 * mean["own"]
    assert most["replayed"] < most["own"]


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_given_experts_are_transformers_with_its_routers_forced(
    job: Job, outcome_of: Outcomes, references: dict[str, Reference]
) -> None:
    """Random experts, several micro-batches and copies; one datum without: gradients of every LoRA matrix."""
    ours, reference = outcome_of(job)["forced"], references[job.family]
    model, parameters = adapted(reference)
    total = torch.zeros(())
    for sequence, experts, found in zip(sequences(), ours["experts"], ours["logprobs"], strict=True):
        with forced(model, experts):
            logits = model(torch.from_numpy(sequence.tokens.astype(np.int64))[None]).logits[0]
        logprobs = logits.log_softmax(-1).gather(1, torch.from_numpy(sequence.targets)[:, None])[:, 0]
        np.testing.assert_allclose(found, logprobs.detach().numpy(), atol=BOUNDS.logits, rtol=0)
        total = total - (logprobs * torch.from_numpy(sequence.weights)).sum()
    total.backward()
    theirs = parameters.grads()
    assert theirs.keys() == ours["grads"].keys()
    gaps = {key: float((ours["grads"][key] - grad).abs().max() / grad.abs().max()) for key, grad in theirs.items()}
    unlike = max(float((reference.grads[key] - grad).abs().max() / grad.abs().max()) for key, grad in theirs.items())
    print(f"\nROUTING REPLAY {job}: gradients {max(gaps.values()):.1e} of transformers', which are {unlike:.1f} off")
    assert unlike > 0.1, "the forced experts change nothing"
    assert max(gaps.values()) <= BOUNDS.gradients


def adapted(reference: Reference) -> tuple[Any, PeftParameters]:
    """transformers + peft with the reference's adapter, to be differentiated."""
    saved = reference.adapter_folder
    if reference.family in LINEARS:
        model, parameters = peft_on_parameters(reference.family, reference.model_folder)
        parameters.write(load_file(saved / "adapter_model.safetensors"))
        return model, parameters
    from peft import PeftModel

    base = load_transformers(reference.model_folder)
    model = PeftModel.from_pretrained(base, str(saved), is_trainable=True)
    return model, PeftParameters(model, base.config.num_experts, shared=True)


@contextmanager
def forced(model: Any, experts_NMK: np.ndarray | None) -> Iterator[None]:
    """transformers' routers give the weights that their formulas give these experts, of their own scores."""
    routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
    if experts_NMK is None:
        yield
        return
    assert len(routers) == experts_NMK.shape[1]
    for router, experts_NK in zip(routers, experts_NMK.transpose(1, 0, 2), strict=True):
        chosen_NK = torch.from_numpy(experts_NK.astype(np.int64))

        def forward(self: Any, hidden: Any, own: Any = router.forward, chosen_NK: Any = chosen_NK) -> Any:
            logits_NE, _, _ = own(hidden)
            kept_NK = logits_NE.gather(1, chosen_NK)
            if type(self).__name__ == "DeepseekV3TopkRouter":
                scores_NK = kept_NK.sigmoid()
                weights_NK = scores_NK / (scores_NK.sum(-1, keepdim=True) + 1e-20) * self.routed_scaling_factor
            else:  # both scale the chosen experts' softmax to sum to 1
                weights_NK = kept_NK.softmax(-1)
            return logits_NE, weights_NK, chosen_NK

        router.forward = types.MethodType(forward, router)
    try:
        yield
    finally:
        for router in routers:
            del router.forward
