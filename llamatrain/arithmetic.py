"""Parameters and floating-point operations of a LLaMA, and what accelerators can do. No torch.

One truth for metrics, recompute choice and planner.
"""

import math
import re

from llamatrain.config.model import ModelConfig

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


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device named as by torch.cuda.get_device_name(); None if it is not known."""
    name = device_name.removeprefix("NVIDIA ")
    for pattern, flops in PEAK_BF16_FLOPS.items():
        if re.fullmatch(pattern, name):
            return flops
    return None
