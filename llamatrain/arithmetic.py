"""Parameters, floating-point operations and memory of a LLaMA, and what accelerators can do. No torch.

One truth for metrics, recompute choice and planner.
"""

import math
import re
from collections.abc import Iterable

from llamatrain.config import RunConfig
from llamatrain.config.model import ModelConfig
from llamatrain.config.parallel import SAVABLE, layout

# Dense bf16 FLOP/s with fp32 accumulation, by what torch.cuda.get_device_name() gives behind "NVIDIA ".
# Whole names only: a MIG slice, a laptop part or a new board must not pass for another. Sources: NVIDIA's
# data sheets (half of what they give with sparsity), its architecture papers GA102 (3090, A6000, A40) and
# Ada (4090), AMD's data sheet of the MI300X.
PEAK_BF16_FLOPS = {
    r"A100-SXM4-(40|80)GB|A100-PCIE-40GB|A100 80GB PCIe": 312e12,
    r"A800-SXM4-80GB|A800 80GB PCIe": 312e12,
    r"H100 80GB HBM3|H800|H200|GH200 (120|480)GB": 989.4e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL|H200 NVL": 835.5e12,
    r"B200": 2250e12,
    r"A10": 125e12,
    r"A30": 165e12,
    r"A40": 149.7e12,
    r"RTX A6000": 154.8e12,
    r"L4": 121e12,
    r"L40S": 362.05e12,
    r"GeForce RTX 3090": 71e12,
    r"GeForce RTX 4090": 165.2e12,
    r"Tesla V100-SXM2-(16|32)GB": 125e12,  # fp16: it has no bf16 units
    r"Tesla V100-PCIE-(16|32)GB": 112e12,
    r"AMD Instinct MI300X": 1307.4e12,
}


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its name, in the order of the model."""
    d, f, vocab = model.dim, model.ffn_width, model.vocab_size
    heads, kv = model.n_heads * model.head_dim, model.kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, d)}
    for i in range(model.n_layers):
        shapes |= {
            f"layers.{i}.attention.wq.weight": (heads, d),
            f"layers.{i}.attention.wk.weight": (kv, d),
            f"layers.{i}.attention.wv.weight": (kv, d),
            f"layers.{i}.attention.wo.weight": (d, heads),
            f"layers.{i}.feed_forward.w1.weight": (f, d),
            f"layers.{i}.feed_forward.w2.weight": (d, f),
            f"layers.{i}.feed_forward.w3.weight": (f, d),
            f"layers.{i}.attention_norm.weight": (d,),
            f"layers.{i}.ffn_norm.weight": (d,),
        }
    shapes["norm.weight"] = (d,)
    if not model.tied_embeddings:
        shapes["output.weight"] = (vocab, d)
    return shapes


def parameter_count(model: ModelConfig) -> int:
    """Exact number of parameters; a tied embedding counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())


def flops_per_token(model: ModelConfig, seq_len: int, *, causal: bool = False) -> int:
    """FLOPs of forward and backward per token by the PaLM convention, 6N + 12*L*d*s (arXiv 2204.02311, B).

    N counts every parameter, the input embedding too. Attention counts the whole [s, s] matrix, or with
    `causal` the half of it that the mask leaves. Nothing is counted for recompute.
    """
    attention = 12 * model.n_layers * model.dim * seq_len
    return 6 * parameter_count(model) + (attention // 2 if causal else attention)


def activation_bytes_per_token_layer(
    model: ModelConfig, recompute: str, *, bytes_per_element: int, save: Iterable[str] = SAVABLE
) -> float:
    """Bytes that one layer keeps for each token between forward and backward, by `parallel.recompute`.

    d is the model's width, f the FFN's, a its heads, r query heads per key head, e the bytes of an element. Attention
    is a fused kernel, which keeps its inputs, its output and an fp32 log-sum-exp per head; inputs that the layer
    before keeps already count here, and the output does not. After Korthikanti et al. (arXiv 2205.05198, section 4),
    whose counts are for GPT; each formula here is measured in tests/test_recompute.py.

    - none: what autograd keeps of each operation, module by module (below); in bf16 (20 + 4/r) d + 8 f + 4 a + 8.
      With the norms and SwiGLU as one kernel each it would be (12 + 4/r) d + 6 f + 4 a + 8.
    - block_backward: x, h, q, k, v, attention's output and gate and up, (4 + 2/r) e d + 2 e f, its log-sum-exp, 4 a,
      and of both norms the reciprocal of the root mean square, 8.
    - selective: x and the outputs of `save`, which may be any of SAVABLE.
    - full: x.
    """
    e, f, a = bytes_per_element, model.ffn_width, model.n_heads
    q, kv = model.n_heads * model.head_dim, model.kv_heads * model.head_dim
    x = e * model.dim
    outputs = {"wq": e * q, "wk": e * kv, "wv": e * kv, "attention": e * q + 4 * a, "wo": x, "w1": e * f, "w3": e * f}
    norm = 4 * model.dim + 4 + 2 * x  # its input in fp32, 1/rms, the product before the weight, the output
    by_autograd = {
        "attention_norm": norm,
        "attention": e * (q + 2 * kv) + outputs["attention"],  # q and k after RoPE; the output is also wo's input
        "ffn_norm": norm,
        "feed_forward": 4 * e * f,  # w1's output, silu of it, w3's output, the product
    }
    if recompute == "none":
        return sum(by_autograd.values())
    if recompute == "block_backward":
        return x + sum(outputs.values()) + 8  # h in the place of wo's output
    if recompute == "selective":
        return x + sum(outputs[name] for name in set(save))
    if recompute == "full":
        return x
    raise ValueError(f"recompute: {recompute!r}")


def training_memory(config: RunConfig, recompute: str, *, world_size: int) -> dict[str, float]:
    """Bytes on the fullest device of a run, part by part. Precision and attention are resolved.

    An estimate from above: the parts are added though not all of them peak at the same moment. Left out are what no
    formula knows: CUDA's context, NCCL's buffers, gaps between allocations.
    """
    model, parallel = config.model, config.parallel
    e, tokens = 2 if config.train.precision == "bf16" else 4, config.train.micro_batch * config.data.seq_len
    kept = activation_bytes_per_token_layer(model, recompute, bytes_per_element=e, save=parallel.recompute_save)
    return {
        "weights, gradients, moments": 16 * parameter_count(model) / layout(parallel, world_size).dp_shard,
        "weights in use": _weights_in_use(config, recompute, world_size, e),
        "gradients kept back": _gradients_kept_back(config, world_size),
        "activations": model.n_layers * tokens * kept,
        "attention matrices": (model.n_layers if recompute == "none" else 1) * tokens * _matrix_row(config, e),
        "last norm": tokens * ((4 + 2 * e) * model.dim + 4),
        "backward of the loss or a layer": _backward(config, recompute, kept, world_size, e),
    }


def _sizes(model: ModelConfig) -> tuple[int, int]:
    """Parameters of one block, and of the embedding or the head."""
    shapes = parameter_shapes(model)
    block = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("layers.0."))
    return block, math.prod(shapes["tok_embeddings.weight"])


def _weights_in_use(config: RunConfig, recompute: str, world_size: int, e: int) -> float:
    """Weights gathered by FSDP2 in the compute dtype; on one process, their copies in it, which autograd keeps."""
    model, parallel = config.model, config.parallel
    block, head = _sizes(model)
    if world_size == 1:
        kept = model.n_layers if recompute in ("none", "block_backward") else 1
        return 0 if e == 4 else e * (kept * block + head)
    ahead = max(1, parallel.forward_prefetch, parallel.backward_prefetch)
    gathered = min(model.n_layers, 1 + ahead)  # the one in use and those on their way
    whole = e * head + (4 * head if model.tied_embeddings else 0)  # both stay gathered until after backward
    if parallel.reshard_after_forward == "never":
        gathered, whole = model.n_layers, e * head + 4 * head
    return e * (gathered * block + 2 * max(block, head)) + whole  # 2: the buffers they are sent from and arrive in


def _gradients_kept_back(config: RunConfig, world_size: int) -> float:
    """Whole gradients that wait for the last micro-batch, beyond the sharded ones, which they come before."""
    ranks = layout(config.parallel, world_size)
    micro_batches = config.global_batch // (config.train.micro_batch * ranks.data_parallel)
    if config.parallel.reduce_scatter == "each" or micro_batches == 1 or world_size == 1:
        return 0
    return parameter_count(config.model) * max(0.0, _reduced(config) - 4 / ranks.dp_shard)


def _reduced(config: RunConfig) -> int:
    """Bytes of a gradient's element on its way to where it is kept."""
    return 2 if config.parallel.reduce_dtype == "bf16" else 4


def _backward(config: RunConfig, recompute: str, kept: float, world_size: int, e: int) -> float:
    """What the fullest moment of the backward holds besides what the forward kept.

    The logits live throughout. In the loss's own backward there are beside them, in fp32, the log-softmax, its
    gradient, and the gradient of what it was taken of. Later, their gradient and that of the head's weight, or a
    block: what is computed again, gradients of its activations (those of the FFN's width are at most two at a time
    in autograd's backward, which frees as it goes, and four in the hand-written one), and of its weights.
    """
    model, tokens = config.model, config.train.micro_batch * config.data.seq_len
    d, f, vocab = model.dim, model.ffn_width, model.vocab_size
    block, head = _sizes(model)
    redone = 0.0
    if recompute in ("selective", "full"):
        redone = activation_bytes_per_token_layer(model, "none", bytes_per_element=e) - kept
    gradients = 4 * e * f + 8 * d if recompute == "block_backward" else 2 * e * (f + d)
    unit = d * f if world_size == 1 else max(block, head)  # the head's gradient may still be on its way to others
    on_their_way = e + _reduced(config)
    return max(
        tokens * vocab * (e + 12),
        tokens * vocab * 2 * e + on_their_way * head,
        tokens * (vocab * e + redone + gradients) + on_their_way * unit,
    )


def _matrix_row(config: RunConfig, e: int) -> float:
    """Bytes per token of the [T, T] matrices that attention keeps, where it is not the kernel that needs none."""
    if config.model.attention == "reference":
        return 4 * config.model.n_heads * config.data.seq_len
    return e * config.data.seq_len if config.model.attention == "sdpa" and config.data.document_mask else 0


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device named as by torch.cuda.get_device_name(); None if it is not known."""
    name = device_name.removeprefix("NVIDIA ")
    for pattern, flops in PEAK_BF16_FLOPS.items():
        if re.fullmatch(pattern, name):
            return flops
    return None
