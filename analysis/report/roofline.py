"""A roofline model of decoding on a GPU, fed by datasheets alone: what Figure 6 would be if nothing else counted.

A decode step of b sequences at context t reads every weight once and every sequence's keys and values once, and
computes two operations a weight and sequence. Reading and computing overlap; the linear layers and attention do not:

    step(b, t) = max(weight bytes / B, 2 b N_linear / F_w) + 2-byte lm_head alike + max(b t kv bytes / B, flops / F_16)

B is the memory's bandwidth, F the dense operations a second in the format that the product runs in: 4-bit where the
chip multiplies FP4, else bfloat16 (dequantized on the way). As many sequences run at once as memory holds at their
full length, at most as many as are asked for; R requests then take R / b turns. Prefill is compute alone.

What it leaves out is why it is only a model: kernels below their peaks, launch and scheduling overhead, activation
quantization, sampling, memory that the framework keeps, GPUs that share a bus. Its error against every number that the
paper reports is printed (`figure6-error`), and it is fitted to none of them.

Sources, by name: NVIDIA DGX B200 datasheet (8 GPUs: 1,440 GB HBM3e, 64 TB/s, 144 PFLOPS FP4 and 72 PFLOPS FP8 with
sparsity; a dense GPU is a sixteenth of these operations, bfloat16 half of FP8), NVIDIA DGX Spark datasheet (128 GB
LPDDR5x, 273 GB/s, 1 PFLOP FP4 with sparsity; dense half of it, FP8 and bfloat16 a half and a quarter of that, which the
datasheet does not state), NVIDIA H100 Tensor Core GPU datasheet (SXM: 80 GB, 3.35 TB/s, 1,979 TFLOPS bfloat16 and 3,958
TFLOPS FP8 with sparsity, no FP4).
"""

from __future__ import annotations

from dataclasses import dataclass

from analysis.report import paper
from reqat.config.tier import Shape

PROMPT_TOKENS, REQUESTS = 512, 256  # Figure 6's prompts, and its largest batch
_POINTS = 33  # contexts between prompt and end that a mean over a generation is taken from


@dataclass(frozen=True)
class Device:
    """A GPU as its datasheet gives it: bytes, bytes a second, dense operations a second."""

    name: str
    memory_bytes: float
    bandwidth: float
    bf16: float
    fp8: float
    fp4: float | None

    def operations(self, bits: float) -> float:
        """Peak for products whose operands have so many bits; 4-bit ones run in bfloat16 where there is no FP4."""
        if bits < 8:
            return self.fp4 or self.bf16
        return self.fp8 if bits < 16 else self.bf16


B200 = Device("B200", 180e9, 8e12, 2.25e15, 4.5e15, 9e15)
DGX_SPARK = Device("DGX Spark", 128e9, 273e9, 0.125e15, 0.25e15, 0.5e15)
H100 = Device("H100", 80e9, 3.35e12, 0.9895e15, 1.979e15, None)
DEVICES = (B200, DGX_SPARK, H100)


@dataclass(frozen=True)
class Bits:
    """Bits an element, block scales included, of linear weights and of the KV cache."""

    weight: float
    kv: float


BF16 = Bits(16, 16)
W4A4KV4 = Bits(4.5, 4.5)  # NVFP4: a byte of scale for 16 elements
W4A4KV8 = Bits(4.5, 8)

#: R1-Distill-Qwen-14B, the model of Figure 6.
QWEN_14B = Shape(
    hidden_size=5120, layers=48, heads=40, kv_heads=8, head_dim=128, mlp=13824, vocabulary=152064, tie_embeddings=False
)


@dataclass(frozen=True)
class Memory:
    """Bytes: linear weights, everything else that is stored (16 bits), and the KV cache."""

    linear: float
    other: float
    cache: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.linear + self.other + self.cache


def linear_parameters(model: Shape) -> int:
    """Weights of the linear layers inside the decoder."""
    heads = model.head_dim * (2 * model.heads + 2 * model.kv_heads)  # queries and output; keys and values
    return model.layers * model.hidden_size * (heads + 3 * model.mlp)


def head_parameters(model: Shape) -> int:
    """Weights of lm_head: read in every step, 16 bits."""
    return model.hidden_size * model.vocabulary


def cache_bytes_per_token(model: Shape, bits: Bits) -> float:
    """Bytes of one token's keys and values in all layers."""
    return 2 * model.layers * model.kv_heads * model.head_dim * bits.kv / 8


def memory(model: Shape, bits: Bits, sequences: int, tokens: int) -> Memory:
    """What a batch takes at a context length."""
    norms = model.hidden_size * (2 * model.layers + 1)
    tables = head_parameters(model) * (1 if model.tie_embeddings else 2)
    cache = sequences * tokens * cache_bytes_per_token(model, bits)
    return Memory(linear_parameters(model) * bits.weight / 8, 2.0 * (tables + norms), cache)


def capacity(model: Shape, bits: Bits, device: Device, tokens: int) -> int:
    """Sequences of so many tokens that fit beside the weights; 0 if not one does."""
    weights = memory(model, bits, 0, 0).total
    return max(0, int((device.memory_bytes - weights) // (tokens * cache_bytes_per_token(model, bits))))


def step_seconds(model: Shape, bits: Bits, device: Device, batch: float, context: float) -> float:
    """Time of one decode step of ``batch`` sequences that each see ``context`` tokens."""
    linear, head = linear_parameters(model), head_parameters(model)
    layers = max(
        linear * bits.weight / 8 / device.bandwidth,
        2 * batch * linear / device.operations(min(bits.weight, 16)),
    )
    logits = max(2 * head / device.bandwidth, 2 * batch * head / device.bf16)
    flops = 4 * batch * context * model.layers * model.heads * model.head_dim
    attention = max(
        batch * context * cache_bytes_per_token(model, bits) / device.bandwidth,
        flops / device.bf16,
    )
    return layers + logits + attention


def tokens_per_s(
    model: Shape, bits: Bits, device: Device, requests: int, output_tokens: int, prompt_tokens: int = PROMPT_TOKENS
) -> float:
    """Output tokens a second of ``requests`` requests, prefill included; 0 where not one fits in memory."""
    batch = min(requests, capacity(model, bits, device, prompt_tokens + output_tokens))
    if batch < 1:
        return 0.0
    contexts = [prompt_tokens + output_tokens * i / (_POINTS - 1) for i in range(_POINTS)]
    decode = output_tokens * sum(step_seconds(model, bits, device, batch, t) for t in contexts) / _POINTS
    prefill = 2 * batch * prompt_tokens * linear_parameters(model) / device.operations(min(bits.weight, 16))
    return batch * output_tokens / (decode + prefill)


def ratio(
    model: Shape, bits: Bits, device: Device, requests: int, output_tokens: int, prompt_tokens: int = PROMPT_TOKENS
) -> float:
    """Throughput relative to BF16 on the same device and requests; NaN where BF16 does not fit."""
    base = tokens_per_s(model, BF16, device, requests, output_tokens, prompt_tokens)
    return tokens_per_s(model, bits, device, requests, output_tokens, prompt_tokens) / base if base else float("nan")


@dataclass(frozen=True)
class Point:
    """A number that the paper reports beside what the model says."""

    device: Device
    bits: Bits
    cache: str  # "FP8" | "FP4"
    method: str  # "native" | "ReQAT"
    output_tokens: int
    reported: float
    modelled: float
    limited: int
    """Sequences at once that memory allows BF16 (at most the requests)."""

    @property
    def error(self) -> float:
        """``modelled / reported - 1``."""
        return self.modelled / self.reported - 1


def points() -> list[Point]:
    """Every ratio that Figure 6 reports, beside the model at the largest batch. Raises ValueError for other GPUs."""
    known = {"B200": (B200, W4A4KV4, "FP4"), "DGX-Spark (FP8 KV)": (DGX_SPARK, W4A4KV8, "FP8")}
    out = []
    for row in paper.select("figure6"):
        where = row.condition["device"]
        if where not in known:
            raise ValueError(
                f"Figure 6 reports a device {where!r}; give it its datasheet in analysis/report/roofline.py"
            )
        device, bits, cache = known[where]
        tokens = int(row.condition["output_tokens"])
        modelled = ratio(QWEN_14B, bits, device, REQUESTS, tokens)
        limited = min(REQUESTS, capacity(QWEN_14B, BF16, device, PROMPT_TOKENS + tokens))
        out.append(Point(device, bits, cache, row.method, tokens, row.value, modelled, limited))
    return out
