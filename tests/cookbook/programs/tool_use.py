"""tinker-cookbook's tool-use library, without a service behind the tool: a calculator.

tool_use.py MODEL_NAME LOG_PATH

The model first sees a few right tool calls (supervised), because the tiny base has never met one; then rl.train samples
episodes in which the calls it writes are really made. Written as the cookbook's own recipes are; nothing of tinker_hpc.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import chz
import tinker
from tinker_cookbook import renderers
from tinker_cookbook.renderers.base import Message, ToolCall, get_text_content
from tinker_cookbook.rl import train
from tinker_cookbook.rl.types import Env, EnvGroupBuilder, RLDataset, RLDatasetBuilder
from tinker_cookbook.supervised.data import conversation_to_datum
from tinker_cookbook.tool_use import ToolResult, build_agent_tool_env, simple_tool_result, tool
from transformers import AutoTokenizer

RENDERER = "qwen3_disable_thinking"
CALLS: list[tuple[int, int]] = []
"""Every call the model made, as the tool saw it."""


@tool
async def add(a: Annotated[int, "first"], b: Annotated[int, "second"]) -> ToolResult:
    """Add two numbers."""
    CALLS.append((a, b))
    return simple_tool_result(str(a + b))


def renderer_for(model_name: str) -> renderers.Renderer:
    # A tokenizer of its own for each episode: episodes render in threads, and one fast tokenizer used by two threads
    # at once raises "Already borrowed" (cookbook's get_tokenizer gives everybody the same).
    return renderers.get_renderer(RENDERER, AutoTokenizer.from_pretrained(model_name))


def prompt(renderer: renderers.Renderer, a: int, b: int) -> list[Message]:
    prefix = renderer.create_conversation_prefix_with_tools(tools=[add.to_spec()], system_prompt="")
    return [*prefix, {"role": "user", "content": f"What is {a} + {b}?"}]


def shown(renderer: renderers.Renderer, a: int, b: int) -> list[Message]:
    """The prompt and the right call."""
    function = ToolCall.FunctionBody(name="add", arguments=json.dumps({"a": a, "b": b}))
    call: Message = {"role": "assistant", "content": "", "tool_calls": [ToolCall(function=function, id="1")]}
    return [*prompt(renderer, a, b), call]


def teach(model_name: str, num_steps: int) -> str:
    """Supervised steps on right calls. Returns the path of the state."""
    renderer, rng = renderer_for(model_name), random.Random(0)
    training = tinker.ServiceClient().create_lora_training_client(base_model=model_name, rank=16, seed=0).result()
    for step in range(num_steps):
        batch = [
            conversation_to_datum(
                shown(renderer, rng.randint(10, 20), rng.randint(10, 20)),
                renderer,
                2048,
                renderers.TrainOnWhat.LAST_ASSISTANT_MESSAGE,
            )
            for _ in range(4)
        ]
        output = training.forward_backward(batch, "cross_entropy")
        training.optim_step(tinker.AdamParams(learning_rate=5e-3, grad_clip_norm=1.0)).result()
        print("taught", step, output.result().metrics["loss:sum"], flush=True)
    return training.save_state("taught").result().path


@dataclass(frozen=True)
class SumGroup(EnvGroupBuilder):
    """A group of episodes with one sum."""

    model_name: str
    a: int
    b: int

    async def make_envs(self) -> Sequence[Env]:
        async def reward(history: list[Message]) -> tuple[float, dict[str, float]]:
            said = any(str(self.a + self.b) in get_text_content(message) for message in history[1:])
            called = any(message["role"] == "tool" for message in history)
            return float(said), {"tool_called": float(called)}

        own = [renderer_for(self.model_name) for _ in range(4)]
        return [
            build_agent_tool_env(renderer, [add], prompt(renderer, self.a, self.b), reward, max_turns=2)
            for renderer in own
        ]


@dataclass(frozen=True)
class Sums(RLDataset):
    model_name: str

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        return [SumGroup(self.model_name, 12 + index, 15), SumGroup(self.model_name, 17, 11 + index)]

    def __len__(self) -> int:
        return 1


@chz.chz
class SumsBuilder(RLDatasetBuilder):
    model_name: str

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        return Sums(self.model_name), None


def main(model_name: str, log_path: str) -> None:
    config = train.Config(
        model_name=model_name,
        recipe_name="tool_use",
        renderer_name=RENDERER,
        log_path=log_path,
        dataset_builder=SumsBuilder(model_name=model_name),
        load_checkpoint_path=teach(model_name, num_steps=30),
        learning_rate=1e-4,
        max_tokens=96,
        lora_rank=16,
        eval_every=0,
    )
    asyncio.run(train.main(config))
    print("CALLS", json.dumps(CALLS))


if __name__ == "__main__":
    main(*sys.argv[1:])
