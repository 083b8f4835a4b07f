"""Memory of one rank, by part, from a model's sizes and a layout (pure).

Weights, adapters and the KV cache are counted exactly (tests compare with the built model). Activations are what
autograd keeps for the backward, added up tensor by tensor below, in the order of a decoder layer; tests compare the
sum with the tensors that are really kept (within 10 %), and the whole with the measured peak of a process.

T tokens of a micro-batch, H hidden, I MLP width, q and kv attention widths, K experts a token, b bytes a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.model_sizes import ModelSizes, Split, adapter_parameters, base_parameters

GIB = 2**30
BYTES_PER_TRAINED = 16
"""float32 weight, gradient and both Adam moments."""
LOGIT_CHUNK = 2**26
"""Logits held at a time (megatron_adapters/head.py)."""
CACHE_SHARE_GPU, CACHE_SHARE_CPU = 0.6, 0.25
"""Of the room beside weights and adapters, what sampling may fill with keys and values (megatron_adapters/sampler.py).
The same room holds activations while a pass runs: the cache is emptied before."""
SNAPSHOT_SHARE = 0.05
"""Of that room, what snapshots of adapters for sampling may take beside one (megatron_adapters/snapshot_room.py)."""
MAX_SNAPSHOTS = 16
"""Of an adapter (tinker_hpc/worker/train_step.py)."""
SNAPSHOT_COPIES = {"attention": 2.6, "mlp": 2.0, "experts": 1.0, "unembed": 2.0}
"""What a snapshot takes, as a multiple of its matrices: all but experts' are kept a second time as products read them,
those of queries, keys and values with zeros between (megatron_adapters/lora_inference.py): 2.46 for Qwen3-8B's
attention, 2.59 for Qwen3-30B-A3B's."""
CUDA_CONTEXT_GIB = 1.0
"""CUDA context, cuBLAS workspaces and kernels of one process. Assumed, not measured by us."""
NCCL_GIB = 1.0
"""Buffers of the communicators of a rank that is not alone. Assumed, not measured by us."""
MARGIN = 0.1
"""Of a GPU's memory, left free: blocks the allocator cannot reuse, and what an estimate within 15 % may miss."""
CPU_PROCESS_GIB = 0.37
"""Python with torch, megatron-core and transformers loaded: measured 0.368 to 0.379."""
HEAP_ON_CPU = 1.2
"""What tensors that come and go take in glibc's heap, as a multiple of their size: measured 1.07 and 1.23 on two
models."""
HEAP_RECOMPUTING = 1.8
"""The same where activations are computed again: measured 1.79. They come and go between inputs that stay."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, the fullest."""

    weights: int
    adapters: int
    """With gradients and Adam moments."""
    snapshots: int
    """Frozen copies of adapters, for sampling."""
    activations: int
    """Of one micro-batch (of several under pipeline parallelism)."""
    cache: int
    """Keys and values of all samples under way. In the same room as the activations: the larger of the two counts."""
    workspace: int
    """The process itself, communication, a chunk of logits, and the tensors of one layer at work."""

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.snapshots + self.workspace + max(self.activations, self.cache)


@dataclass(frozen=True)
class Job:
    """What the ranks are to hold beside the base model."""

    bytes_per_number: int
    """Of weights and activations: 2 in bfloat16, 4 in float32."""
    on_gpu: bool
    lora_rank: int = 32
    num_adapters: int = 1
    per_expert: bool = False
    """Every expert has LoRA matrices of its own, instead of sharing the factor on the hidden side."""
    recompute: bool = False
    """Of each layer only the input is kept for the backward (megatron_adapters/recompute.py)."""


def fixed_memory(sizes: ModelSizes, split: Split, job: Job) -> tuple[int, int]:
    """Bytes of weights, and of adapters with their optimizer state."""
    weights = sum(base_parameters(sizes, split).values()) * job.bytes_per_number
    trained = sum(adapter_parameters(sizes, split, job.lora_rank, per_expert=job.per_expert).values())
    return weights, trained * BYTES_PER_TRAINED * job.num_adapters


def snapshot_memory(sizes: ModelSizes, split: Split, job: Job, room: float) -> int:
    """Bytes for snapshots, of the `room` beside weights and adapters: one in any case, and MAX_SNAPSHOTS of every
    adapter where their share allows it.
    """
    parts = adapter_parameters(sizes, split, job.lora_rank, per_expert=job.per_expert)
    if sizes.num_experts:
        parts["experts"] = parts.pop("mlp")
    one = job.bytes_per_number * sum(SNAPSHOT_COPIES[part] * size for part, size in parts.items())
    return int(max(one, min(MAX_SNAPSHOTS * job.num_adapters * one, SNAPSHOT_SHARE * room)))


def activation_bytes_per_token(sizes: ModelSizes, split: Split, job: Job) -> float:
    """Kept for the backward by one token of a micro-batch on one rank, all its layers together.

    Under pipeline parallelism the first stage keeps pp_size micro-batches (1F1B), so cutting the layers saves nothing.
    """
    dense = attention_bytes(sizes, split, job) + mlp_bytes(sizes, split, job)
    sparse = attention_bytes(sizes, split, job) + expert_bytes(sizes, split, job)
    b = job.bytes_per_number
    layers = sizes.num_dense_layers * dense + sizes.num_expert_layers * sparse
    if job.recompute:  # the layers' inputs
        layers = sizes.num_layers * b * sizes.hidden_size / split.tp_size
    # Embedding and final norm on this rank's share of the tokens; the head's hidden states, and their gradient, on all.
    ends = (b + 4) * sizes.hidden_size / split.tp_size + 2 * b * sizes.hidden_size
    return (layers + ends) * heap_factor(job)


def attention_bytes(sizes: ModelSizes, split: Split, job: Job) -> float:
    """Of one token in one layer: both norms and the attention."""
    b, tp = job.bytes_per_number, split.tp_size
    hidden, q, kv = sizes.hidden_size, sizes.q_size, split.kv_heads(sizes) * sizes.head_dim * tp
    norms = (2 * 2 * b * hidden + 2 * 4) / tp  # input, output as the input of A, and one number in float32
    qkv = b * (q + 2 * kv)  # one fused tensor; v is a view of it
    if sizes.latent is not None:  # the vectors that heads are made of and their norms; keys are put together anew
        qkv += (b + 4) * (sizes.latent.q_rank + sizes.latent.kv_rank)
    qk_norm = b * q if sizes.qk_norm else 0  # queries as a tensor of their own; keys are a view
    rotated = b * (q + kv)
    if sizes.sinks:  # queries, and keys and values repeated for each of them, all a little wider
        rotated += 3 * b * q * (1 + 8 / sizes.head_dim)
    out = b * q * (1 if job.on_gpu else 2) + 4 * sizes.num_heads  # on a CPU unequal ones are put together by a copy
    lora = 4 * b * job.lora_rank
    return norms + (qkv + qk_norm + rotated + out) / tp + lora


def mlp_bytes(sizes: ModelSizes, split: Split, job: Job) -> float:
    """Of one token in one layer: gate and up, and silu(gate) * up (megatron_adapters/swiglu.py)."""
    b = job.bytes_per_number
    return 3 * b * sizes.ffn_size / split.tp_size + 3 * b * job.lora_rank


def expert_bytes(sizes: ModelSizes, split: Split, job: Job) -> float:
    """Of one token in one layer: router, copies of the token for its experts, their inner tensors and outputs.

    Tokens are spread over the ranks (sequence parallelism) and routed evenly, as far as a plan can know.
    """
    b = job.bytes_per_number
    router = 4 * 3 * sizes.num_experts
    kept = 7 if sizes.expert_bias else 4  # gpt-oss clamps gate and up; counted by reading experts.py
    inner = b * (2 * sizes.hidden_size + kept * sizes.expert_ffn_size + 3 * job.lora_rank)
    return (router + sizes.experts_per_token * inner) / split.tp_size


def workspace_bytes(sizes: ModelSizes, split: Split, job: Job, token_budget: int, *, alone: bool) -> int:
    """The process, and what comes and goes while a micro-batch is computed."""
    b = job.bytes_per_number
    logits = min(LOGIT_CHUNK, token_budget * split.vocab_rows(sizes)) * (8 + b)
    moving = max(logits, _layers_at_work(sizes, split, job) * token_budget) * heap_factor(job)
    return _process_bytes(job, alone=alone) + int(moving)


def tokens_that_fit(sizes: ModelSizes, split: Split, job: Job, room: float, *, alone: bool) -> float:
    """The largest micro-batch whose activations and workspace take no more than `room` bytes; 0 if there is none."""
    left = room - _process_bytes(job, alone=alone)
    kept, heap, vocab = activation_bytes_per_token(sizes, split, job), heap_factor(job), split.vocab_rows(sizes)
    logit = (8 + job.bytes_per_number) * heap
    by_logits = left / (kept + vocab * logit)
    if by_logits * vocab > LOGIT_CHUNK:
        by_logits = (left - LOGIT_CHUNK * logit) / kept
    return max(0.0, min(by_logits, left / (kept + _layers_at_work(sizes, split, job) * heap)))


def _layers_at_work(sizes: ModelSizes, split: Split, job: Job) -> float:
    """Bytes of one token for the layer being computed; where it is computed again, beside what its backward needs."""
    layer = max(mlp_bytes(sizes, split, job), expert_bytes(sizes, split, job)) + attention_bytes(sizes, split, job)
    return layer * (2 if job.recompute else 1)


def _process_bytes(job: Job, *, alone: bool) -> int:
    process = CPU_PROCESS_GIB if not job.on_gpu else CUDA_CONTEXT_GIB + (0 if alone else NCCL_GIB)
    return int(process * GIB)


def heap_factor(job: Job) -> float:
    """What the allocator makes of tensors that come and go."""
    if job.on_gpu:
        return 1.0
    return HEAP_RECOMPUTING if job.recompute else HEAP_ON_CPU


def cache_bytes_per_token(sizes: ModelSizes, split: Split, job: Job) -> int:
    """Keys and values of one cached token on one rank."""
    dims = sizes.head_dim + (sizes.latent.value_dim if sizes.latent else sizes.head_dim)
    return split.stage_layers(sizes) * split.kv_heads(sizes) * dims * job.bytes_per_number


def memory(
    sizes: ModelSizes,
    split: Split,
    job: Job,
    token_budget: int,
    *,
    cache_tokens: int = 0,
    snapshots: int = 0,
    alone: bool,
) -> Memory:
    """Everything one rank holds. Without cache and snapshots: of a worker that only trains."""
    weights, adapters = fixed_memory(sizes, split, job)
    return Memory(
        weights=weights,
        adapters=adapters,
        snapshots=snapshots,
        activations=int(activation_bytes_per_token(sizes, split, job) * token_budget),
        cache=cache_bytes_per_token(sizes, split, job) * cache_tokens,
        workspace=workspace_bytes(sizes, split, job, token_budget, alone=alone),
    )
