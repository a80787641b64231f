"""Parameters, floating-point operations and traffic of a LLaMA, and what accelerators can do. No torch.

One truth for metrics, overlap rule and planner; memory has a module of its own.
"""

import math
import re
from collections.abc import Iterable, Mapping

from llamatrain.config import RunConfig
from llamatrain.config.model import ModelConfig
from llamatrain.config.parallel import LINEARS, layout

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

# What a board may draw, W, by the same names; the makers' data sheets. Of the GH200 it is whatever its owner has set.
BOARD_WATTS = {
    r"A(100|800)-SXM4-(40|80)GB": 400,
    r"A100-PCIE-40GB": 250,
    r"A(100|800) 80GB PCIe": 300,
    r"H100 80GB HBM3|H800|H200": 700,
    r"H100 PCIe": 350,
    r"H100 NVL": 400,
    r"H200 NVL": 600,
    r"B200": 1000,
    r"A10": 150,
    r"A30": 165,
    r"A40|RTX A6000": 300,
    r"L4": 72,
    r"L40S": 350,
    r"GeForce RTX 3090": 350,
    r"GeForce RTX 4090": 450,
    r"Tesla V100-SXM2-(16|32)GB": 300,
    r"Tesla V100-PCIE-(16|32)GB": 250,
    r"AMD Instinct MI300X": 750,
}


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its name, in the order of the model."""
    d, vocab = model.dim, model.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, d)}
    for i in range(model.n_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in block_shapes(model).items()}
    shapes["norm.weight"] = (d,)
    if not model.tied_embeddings:
        shapes["output.weight"] = (vocab, d)
    return shapes


def block_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of one block, by its name there."""
    d, f = model.dim, model.ffn_width
    heads, kv = model.n_heads * model.head_dim, model.kv_heads * model.head_dim
    return {
        "attention.wq.weight": (heads, d),
        "attention.wk.weight": (kv, d),
        "attention.wv.weight": (kv, d),
        "attention.wo.weight": (d, heads),
        "feed_forward.w1.weight": (f, d),
        "feed_forward.w2.weight": (d, f),
        "feed_forward.w3.weight": (f, d),
        "attention_norm.weight": (d,),
        "ffn_norm.weight": (d,),
    }


def parameter_count(model: ModelConfig) -> int:
    """Exact number of parameters; a tied embedding counts once."""
    blocks, ends = model.n_layers * block_parameters(model), 1 if model.tied_embeddings else 2
    return blocks + ends * model.vocab_size * model.dim + model.dim


def block_parameters(model: ModelConfig) -> int:
    """Parameters of one block."""
    return sum(math.prod(shape) for shape in block_shapes(model).values())


def micro_batches(config: RunConfig, world_size: int) -> int:
    """Micro-batches of a step on each rank."""
    return config.global_batch // (config.train.micro_batch * layout(config.parallel, world_size).data_parallel)


def micro_batches_in_flight(config: RunConfig, world_size: int, stage: int = 0) -> int:
    """How many micro-batches a pipeline stage keeps the activations of at most; the first stage keeps the most."""
    stages, count = layout(config.parallel, world_size).pp, micro_batches(config, world_size)
    if stages == 1:
        return 1
    return count if config.parallel.pipeline_schedule == "gpipe" else min(count, stages - stage)


def flops_per_token(model: ModelConfig, seq_len: int, *, causal: bool = False) -> int:
    """FLOPs of forward and backward per token by the PaLM convention, 6N + 12*L*d*s (arXiv 2204.02311, B).

    N counts every parameter, the input embedding too. Attention counts the whole [s, s] matrix, or with
    `causal` the half of it that the mask leaves. Nothing is counted for recompute.
    """
    attention = 12 * model.n_layers * model.dim * seq_len
    return 6 * parameter_count(model) + (attention // 2 if causal else attention)


STATE_BYTES = 16  # of a parameter while it is trained: weight, gradient and two moments, all fp32
SAVED_BYTES = 12  # of a parameter in a checkpoint: weight and two moments


def element_bytes(config: RunConfig) -> int:
    """Bytes of an element of what products take: weights as they are gathered, and activations."""
    return 2 if config.train.precision == "bf16" else 4


def reduced_bytes(config: RunConfig) -> int:
    """Bytes of a gradient's element on its way to where it is kept."""
    return 2 if config.parallel.reduce_dtype == "bf16" else 4


def tokens_that_hide(
    config: RunConfig, *, world_size: int, flops: float, gather: float, all_reduce: float = math.inf
) -> dict[str, float]:
    """Tokens a rank's micro-batch needs for a block's communication to take no longer than its computation.

    By phase: `forward`; `backward`; and `a step's last backward`, where more is sent in that than in the others.
    Precision and recompute are settled. `flops` is what a device computes a second. `gather`: bytes of gathered weights
    that arrive on all ranks that share them, a second; where those lie on several nodes, that is what the network
    carries into one node, all of whose GPUs need the same. `all_reduce`: bytes a second at which copies of the weights
    (dp_replicate) add up what each rank has of them, all ranks of a node at once.

    The products of a block of P parameters are 2 P T floating-point operations in forward and 4 P T in backward, on T
    tokens. Meanwhile the next block is gathered, e P bytes (e of the compute dtype's element), in backward too unless
    it was kept, where also the gradients of the block before are reduced and scattered, r P bytes (r of reduce_dtype's
    element), at the same rate. What is sent in a phase hides if it takes no longer than what is computed:

        forward   e P / gather <= 2 P T / flops            T >= flops / gather        in bf16
        backward  (e + r) P / gather <= 4 P T / flops      T >= flops / gather        reduced in bf16
                                                           T >= 1.5 flops / gather    reduced in fp32

    P falls out: the rule is the same for every size, and for a part of each weight (tp). Copies add up r P / shards
    bytes on a rank, on links of their own and at the same time, so the slower of the two decides. Recompute that
    repeats products computes more and hides more. Left out is attention itself, which also hides some; and the
    embedding and the head, one gather each a micro-batch.
    """
    parallel, ranks = config.parallel, layout(config.parallel, world_size)
    e, r = element_bytes(config), reduced_bytes(config)
    one = micro_batches(config, world_size) == 1
    weights = e if ranks.shards > 1 else 0

    def backward(*, reduced: bool, summed: bool) -> float:
        gathered = weights if parallel.reshard_after_forward == "always" else 0
        scattered = r if reduced and ranks.shards > 1 else 0
        added_up = r / ranks.shards if summed and ranks.dp_replicate > 1 else 0
        seconds = max((gathered + scattered) / gather, added_up / all_reduce)  # per parameter
        return seconds * flops / (4 + 2 * products_repeated(config))

    each = backward(reduced=one or parallel.reduce_scatter == "each", summed=one or parallel.all_reduce == "each")
    last = backward(reduced=True, summed=True)
    needed = {"forward": weights / gather * flops / 2, "backward": each}
    return needed if last == each else {**needed, "a step's last backward": last}


def products_repeated(config: RunConfig, recompute: str | None = None) -> float:
    """The share of a block's parameters whose products backward computes again; never w2's, which it does not read.

    By `recompute`; by the configuration's if it is None.
    """
    kept: Iterable[str] = {"full": ("w2",), "selective": (*config.parallel.recompute_save, "w2")}.get(
        recompute or config.parallel.recompute, LINEARS
    )
    sizes = {
        name.split(".")[-2]: math.prod(shape) for name, shape in block_shapes(config.model).items() if len(shape) == 2
    }
    return sum(size for name, size in sizes.items() if name not in kept) / sum(sizes.values())


def save_interval_s(cost_s: float, failure_s: float) -> float:
    """Seconds between two saves that lose the least time: Daly (Future Generation Computer Systems 22, 2006, eq. 37).

    `cost_s`: what a save costs training; `failure_s`: mean time between two failures. To first order it is Young's
    sqrt(2 cost failure); where a save costs as much as two failures' distance, there is nothing better than that
    distance.
    """
    if cost_s >= 2 * failure_s:
        return failure_s
    ratio = cost_s / (2 * failure_s)
    return math.sqrt(2 * cost_s * failure_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def seconds_between_failures(devices: int) -> float:
    """Mean time between failures at Llama 3's rate (arXiv 2407.21783, 3.3.4): 419 in 54 days on 16,384 GPUs."""
    return 54 * 86_400 * 16_384 / 419 / devices


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device named as by torch.cuda.get_device_name(); None if it is not known."""
    return _of_device(PEAK_BF16_FLOPS, device_name)


def board_watts(device_name: str) -> float | None:
    """What such a board may draw, W; None if it is not known."""
    return _of_device(BOARD_WATTS, device_name)


def _of_device(table: Mapping[str, float], device_name: str) -> float | None:
    name = device_name.removeprefix("NVIDIA ")
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, name)), None)


PUE = 1.1  # what a data centre draws for each unit of energy that arrives at its accelerators; the paper's
KG_PER_KWH = 0.385  # of CO2 equivalent, the average of the grid of the United States; the paper's


def carbon(gpu_hours: float, *, watts: float, pue: float = PUE, kg_per_kwh: float = KG_PER_KWH) -> tuple[float, float]:
    """Energy in MWh and emissions in tonnes of CO2 equivalent, by the method of LLaMA's paper (arXiv 2302.13971, 6).

    Accelerators draw `watts` all the time. Hosts, network, and what making it all cost, are left out.
    """
    mwh = gpu_hours * watts * pue / 1e6
    return mwh, mwh * kg_per_kwh
