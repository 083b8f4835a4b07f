"""The tiny base model is what its README says, and its corpus keeps the promises that tests build on."""

from __future__ import annotations

import collections
import json
import random
from pathlib import Path

import pytest
import torch
from models import corpus
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

FOLDER = Path(corpus.__file__).parent / "tiny-qwen3"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def test_size(model: PreTrainedModel) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) <= 4_000_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert json.loads((FOLDER / "config.json").read_text())["dtype"] == "bfloat16"


def test_widths_divide_by_tp_4(model: PreTrainedModel) -> None:
    config = model.config
    for width in (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size, config.vocab_size):
        assert width % 4 == 0


def test_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 1024
    text = "12 + 345 = 357, naïve ☕\n\n  done"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("345")] == ["3", "4", "5"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


def test_chat_template_writes_what_the_corpus_trained_on(tokenizer: PreTrainedTokenizerBase) -> None:
    text = corpus.chats(random.Random(3))
    turns = [part.removesuffix("<|im_end|>\n").split("\n", 1) for part in text.split("<|im_start|>")[1:]]
    chat = [{"role": role, "content": content} for role, content in turns]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_held_out_pairs_are_a_fair_tenth() -> None:
    """No last digit of the sum may be missing from training: the model could not answer such sums at all."""
    pairs = [(a, b) for a in range(100) for b in range(100)]
    held_out = [pair for pair in pairs if corpus.is_held_out(*pair)]
    assert 0.09 < len(held_out) / len(pairs) < 0.11
    assert all(corpus.is_held_out(b, a) for a, b in held_out)
    last_digits = collections.Counter((a + b) % 10 for a, b in held_out)
    assert all(60 < last_digits[digit] < 140 for digit in range(10)), last_digits


def test_it_adds(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Greedy answers to unseen sums; README.md has the share over a thousand of them."""
    pairs = [(a, b) for a in range(12, 100, 8) for b in range(11, 100, 3) if corpus.is_held_out(a, b)]
    right = 0
    for a, b in pairs:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {a} + {b}?"}], add_generation_prompt=True, return_tensors="pt"
        )
        answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        right += tokenizer.decode(answer, skip_special_tokens=True).strip() == str(a + b)
    assert len(pairs) >= 25
    assert right / len(pairs) >= 0.5
