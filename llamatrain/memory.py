"""Memory of a training run by formula, for the choice of recompute and the planner. No torch.

In the formulas d is the model's width, f the FFN's, a its heads, r query heads per key head, e the bytes of an element
of the compute dtype. Each is measured in tests/test_recompute.py, that of a pipeline in
tests/distributed/test_pipeline.py.
"""

import math
from collections.abc import Iterable, Iterator

from llamatrain.arithmetic import (
    STATE_BYTES,
    block_parameters,
    block_shapes,
    element_bytes,
    micro_batches,
    micro_batches_in_flight,
    reduced_bytes,
)
from llamatrain.config import RunConfig
from llamatrain.config.model import ModelConfig
from llamatrain.config.parallel import SAVABLE, layout, stage_layers

VECTORS = 40  # bytes that the loss needs for each token beside its logits: target, maximum, sum, masks
USABLE = 0.9  # of a device's memory; the rest is CUDA's context, NCCL's buffers, and gaps between allocations
STATE = "weights, gradients, moments"
LOGITS_BYTES = 128 << 20  # fp32 logits of a chunk. On CPU a step takes the same time from 32 to 256 MiB


def activation_bytes_per_token_layer(
    model: ModelConfig,
    recompute: str,
    *,
    bytes_per_element: int,
    save: Iterable[str] = SAVABLE,
    compiled: bool = False,
    tp: int = 1,
) -> float:
    """Bytes that one layer keeps for each token between forward and backward, by `parallel.recompute`.

    Attention is a fused kernel, which keeps its inputs, its output and an fp32 log-sum-exp per head; inputs that the
    layer before keeps already count here, and the output does not. After Korthikanti et al. (arXiv 2205.05198, section
    4), whose counts are for GPT. By one rank alone:

    - none: what autograd keeps of each operation, module by module (below); in bf16 (20 + 4/r) d + 8 f + 4 a + 8.
      `compiled`, norms and SwiGLU are one operation each: (12 + 4/r) d + 6 f + 4 a + 8.
    - block_backward: x, h, q, k, v, attention's output and gate and up, (4 + 2/r) e d + 2 e f, its log-sum-exp, 4 a,
      and of both norms the reciprocal of the root mean square, 8.
    - selective: x and the outputs of `save`, which may be any of SAVABLE.
    - full: x.

    Of `tp` ranks each has a tp-th of all that, but of two things the whole: norms' outputs once gathered, which only
    `none` keeps, and wo's output, a part of a sum over the ranks, which `selective` keeps.
    """
    e, f, a = bytes_per_element, model.ffn_width / tp, model.n_heads / tp
    q, kv = a * model.head_dim, model.kv_heads * model.head_dim / tp
    whole, x = e * model.dim, e * model.dim / tp
    outputs = {"wq": e * q, "wk": e * kv, "wv": e * kv, "attention": e * q + 4 * a, "wo": whole}
    outputs |= {"w1": e * f, "w3": e * f}
    if recompute == "none":
        norm = _norm_bytes(model, bytes_per_element=e, compiled=compiled, tp=tp)
        attention = e * (q + 2 * kv) + outputs["attention"]  # q and k after RoPE; the output is also wo's input
        feed_forward = (3 if compiled else 4) * e * f  # w1's output, (silu of it,) w3's output, the product
        return 2 * norm + attention + feed_forward
    if recompute == "block_backward":
        return x + sum(outputs.values()) - whole + x + 8 / tp  # h in the place of wo's output
    if recompute == "selective":
        return x + sum(outputs[name] for name in set(save))
    if recompute == "full":
        return x
    raise ValueError(f"recompute: {recompute!r}")


def _norm_bytes(model: ModelConfig, *, bytes_per_element: int, compiled: bool, tp: int) -> float:
    """What autograd keeps of a norm for each token: input (in fp32), 1/rms, (the product before the weight,) output."""
    x = bytes_per_element * model.dim
    own = x + 4 if compiled else 4 * model.dim + 4 + x
    return own / tp + x  # the output as all ranks have it


def tokens_per_chunk(tokens: int, *, width: int, vocab_rows: int) -> int:
    """How many of `tokens` the loss takes together: chunks of nearly the same size, as few as keep the logits small.

    Small is LOGITS_BYTES, or what the head's own gradient [V, D] takes, which is there in any case.
    """
    most = max(width, LOGITS_BYTES // (4 * max(1, vocab_rows)))
    chunks = math.ceil(tokens / most)
    return math.ceil(tokens / chunks) if chunks else 1


def training_memory(config: RunConfig, recompute: str, *, world_size: int) -> dict[str, float]:
    """Bytes on the fullest device of a run, part by part. Precision, compilation and attention are resolved.

    An estimate from above: the parts are added though not all of them peak at the same moment. Left out are what no
    formula knows: CUDA's context, NCCL's buffers, gaps between allocations.
    """
    stages = range(layout(config.parallel, world_size).pp)
    found = (_Stage(config, recompute, world_size, stage).parts() for stage in stages)
    return max(found, key=lambda parts: sum(parts.values()))


def memory_by_part(config: RunConfig, recompute: str, *, world_size: int) -> dict[str, float]:
    """`training_memory` with weights, gradients and optimizer state one by one and to the byte."""
    found, stages = [], layout(config.parallel, world_size).pp
    counts = [len(layers) for layers in stage_layers(config.model.n_layers, stages)]
    # later ones with no more layers have fewer micro-batches at a time
    for stage in {0, min(1, stages - 1), counts.index(max(counts)), stages - 1}:
        parts = _Stage(config, recompute, world_size, stage).parts()
        del parts[STATE]
        found.append({**state_bytes(config, world_size=world_size, stage=stage), **parts})
    return max(found, key=lambda parts: sum(parts.values()))


def state_bytes(config: RunConfig, *, world_size: int, stage: int = 0, shard: int = 0) -> dict[str, int]:
    """Bytes that a rank has of weights, gradients and optimizer state, exactly.

    FSDP2 gives each of its ranks as many rows of a parameter, the last ones fewer or none, but all the room for the
    same, in the weights and in the gradients as they arrive; AdamW has two moments of the rank's own rows (`shard` is
    its place among those that share the parameters; the first has the most) and counts the steps of each parameter by
    itself. All is fp32. fairscale's flat shards are a few elements longer or shorter than this.
    """
    mesh = layout(config.parallel, world_size)
    with_room = own = count = 0
    for rows, width, times in _shapes_of(config, stage=stage, stages=mesh.pp, tp=mesh.tp):
        each = math.ceil(rows / mesh.shards)
        with_room += times * each * width
        own += times * min(each, max(0, rows - shard * each)) * width
        count += times
    return {"weights": 4 * with_room, "gradients": 4 * with_room, "optimizer state": 8 * own + 4 * count}


def _shapes_of(config: RunConfig, *, stage: int, stages: int, tp: int) -> Iterator[tuple[int, int, int]]:
    """Rows and row length of each parameter of a stage, as a rank of `tp` has it, and how many are alike."""
    model = config.model
    layers, last = len(stage_layers(model.n_layers, stages)[stage]), stage == stages - 1
    for name, shape in block_shapes(model).items():
        by_columns = name.split(".")[-2] in ("wo", "w2")
        if len(shape) == 1:
            yield shape[0], 1, layers
        elif by_columns:
            yield shape[0], shape[1] // tp, layers
        else:
            yield shape[0] // tp, shape[1], layers
    ends = 1 if model.tied_embeddings else (stage == 0) + last
    yield model.vocab_size // tp, model.dim, ends
    yield model.dim, 1, int(last)


class _Stage:
    """A device of one pipeline stage: the layers it has, either end, and its share of tokens and weights."""

    def __init__(self, config: RunConfig, recompute: str, world_size: int, stage: int) -> None:
        self.mesh = layout(config.parallel, world_size)
        self.first, self.last = stage == 0, stage == self.mesh.pp - 1
        self.config, self.parallel, self.recompute, self.world_size = config, config.parallel, recompute, world_size
        self.layers = len(stage_layers(config.model.n_layers, self.mesh.pp)[stage])
        self.in_flight = micro_batches_in_flight(config, world_size, stage)
        self.model, self.e = config.model, element_bytes(config)
        self.tokens = config.train.micro_batch * config.data.seq_len // self.mesh.cp
        self.block = block_parameters(config.model) / self.mesh.tp
        self.head = config.model.vocab_size * config.model.dim / self.mesh.tp
        ends = 1 if config.model.tied_embeddings else self.first + self.last
        self.weights = self.layers * self.block + ends * self.head + self.last * config.model.dim

    def parts(self) -> dict[str, float]:
        """Bytes by what they are for."""
        kept, held = self._kept(self.recompute), self.in_flight * self.layers
        at_head = self.in_flight if self.last else 0
        norm = _norm_bytes(self.model, bytes_per_element=self.e, compiled=self._compiled, tp=self.mesh.tp)
        return {
            STATE: STATE_BYTES * self.weights / self.mesh.shards,
            "weights in use": self._weights_in_use(),
            "gradients kept back": self._gradients_kept_back(),
            "last gradient on its way": self._last_reduction(),
            "activations": held * self.tokens * kept,
            "hidden states between stages": self._between_stages(),
            "attention matrices": (held if self.recompute == "none" else 1) * self.tokens * self._matrix_row(),
            "last norm": at_head * self.tokens * norm,
            "gradients of the head": max(0, at_head - 1) * self._loss_gradients(),  # made in the loss's forward
            "loss, or backward of a layer": max(self._loss(), self._backward(kept)),
        }

    @property
    def _compiled(self) -> bool:
        return bool(self.config.train.compile)

    def _kept(self, recompute: str) -> float:
        return activation_bytes_per_token_layer(
            self.model,
            recompute,
            bytes_per_element=self.e,
            save=self.parallel.recompute_save,
            compiled=self._compiled,
            tp=self.mesh.tp,
        )

    def _weights_in_use(self) -> float:
        """Weights gathered by FSDP2 in the compute dtype; on one process, their copies in it, which autograd keeps."""
        e, tied = self.e, self.model.tied_embeddings
        if self.world_size == 1:
            kept = self.layers if self.recompute in ("none", "block_backward") else 1
            return 0 if e == 4 else e * (kept * self.block + self.head)
        ahead = max(1, self.parallel.forward_prefetch, self.parallel.backward_prefetch)
        gathered = min(self.layers, 1 + ahead)  # the one in use and those on their way
        whole = e * self.head + (4 * self.head if tied else 0)  # both stay gathered until after backward
        if self.parallel.reshard_after_forward == "never":
            gathered, whole = self.layers, e * self.head + 4 * self.head
        buffers = 2 * max(self.block, self.head)  # that they are sent from and arrive in
        return e * (gathered * self.block + buffers) + whole

    def _gradients_kept_back(self) -> float:
        """Whole gradients that wait for the last micro-batch, beyond the sharded ones, which they come before."""
        alone = self.world_size == 1 or micro_batches(self.config, self.world_size) == 1
        if self.parallel.reduce_scatter == "each" or alone:
            return 0
        return self.weights * max(0.0, reduced_bytes(self.config) - 4 / self.mesh.shards)

    def _between_stages(self) -> float:
        """torch has memory for what arrives of each micro-batch, hidden state or gradient; what leaves waits."""
        if self.mesh.pp == 1:
            return 0
        arriving = (2 - self.first - self.last) * micro_batches(self.config, self.world_size)
        return self.tokens / self.mesh.tp * self.model.dim * self.e * (arriving + self.in_flight)

    def _loss_gradients(self) -> float:
        """What the loss keeps for its backward: gradients of its input and of the head, in fp32 if added up."""
        added_up = self._chunk < self.tokens
        return self.tokens * self.model.dim * self.e + self.head * (4 if added_up else self.e)

    @property
    def _chunk(self) -> int:
        rows = self.model.vocab_size // self.mesh.tp
        return tokens_per_chunk(self.tokens, width=self.model.dim, vocab_rows=rows)

    def _loss(self) -> float:
        """The logits of one chunk, in fp32 too if they are not, and gradients; later the scaled ones beside them."""
        if not self.last:
            return 0
        element = self.e if self.e == 4 else self.e + 4
        if self._compiled and self.mesh.tp == 1:
            element = 2 * self.e  # and their gradient
        logits = self._chunk * (self.model.vocab_size / self.mesh.tp * element + VECTORS)
        product = self.e * self.head if self.e < 4 and self._chunk < self.tokens else 0
        scaled = self.tokens * self.model.dim * self.e + (self.e + reduced_bytes(self.config)) * self.head
        return self._loss_gradients() + max(logits + product, scaled)

    def _backward(self, kept: float) -> float:
        """What the fullest moment of a block's backward holds besides what the forward kept.

        That is what is computed again, gradients of its activations (those of the FFN's width are at most two at a
        time in autograd's backward, which frees as it goes, and four in the hand-written one), and of its weights;
        and where ranks share sequences, all their keys and values, with gradients in fp32.
        """
        e, d, f = self.e, self.model.dim, self.model.ffn_width
        redone = self._kept("none") - kept if self.recompute in ("selective", "full") else 0.0
        gradients = 4 * e * f / self.mesh.tp + 8 * d
        if self.recompute != "block_backward":
            gradients = 2 * e * (f / self.mesh.tp + d)
        keys = self.model.kv_heads * self.model.head_dim / self.mesh.tp
        shared = self.tokens * self.mesh.cp * 2 * keys * (e + 4) if self.mesh.cp > 1 else 0
        # the head's gradient may still be on its way to others
        unit = d * f if self.world_size == 1 else max(self.block, self.head)
        return self.tokens * (redone + gradients) + shared + (e + reduced_bytes(self.config)) * unit

    def _last_reduction(self) -> float:
        """FSDP2 holds what a gradient was sent from and arrived in until the next one's; the embedding's is last."""
        sharded = self.world_size > 1 and self.first
        return self.head * reduced_bytes(self.config) * (1 + 1 / self.mesh.shards) if sharded else 0

    def _matrix_row(self) -> float:
        """Bytes per token of the [T, T] matrices that attention keeps, where it is not the kernel that needs none."""
        length = self.config.data.seq_len
        if self.model.attention == "reference":
            return 4 * self.model.n_heads / self.mesh.tp * length
        return self.e * length if self.model.attention == "sdpa" and self.config.data.document_mask else 0
