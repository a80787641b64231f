"""The time of a training step, part by part, by what a GPU and its links can do at most. No torch.

Of each part the bytes or floating-point operations are counted, and divided by the rate of what is the narrowest for
it:

- matrix products by the peak. Of it large ones reach a share that is calibrated; smaller ones lose half a wave of
  tiles at their end, and the filling of the pipeline over K.
- attention's kernels by the peak, of which they reach a share of their own.
  In fp32 both by the peak of fp32, with the shares of bf16: nobody publishes runs in it.
- what is elementwise, FSDP's copies and the optimizer by the bandwidth of the memory.
- gathers, reductions and exchanges by the links inside nodes and between them. FSDP's hide behind a block's
  computation as far as they take no longer, but take memory bandwidth and processors from it; those of tensor and
  context parallelism hide behind nothing.

The shape of the model, the layout and the recompute choice are those of the configuration. What is calibrated are two
shares for each kind of GPU; the constants below are the same for all.
"""

import math
from dataclasses import dataclass, field, fields

from llamatrain.arithmetic import block_shapes, element_bytes, micro_batches, products_repeated, reduced_bytes
from llamatrain.config import RunConfig
from llamatrain.config.parallel import Layout, layout, stage_layers
from llamatrain.errors import ConfigError
from llamatrain.planning.hardware import Cluster, Gpu

STREAMED = 0.80  # of the memory's bandwidth that elementwise kernels reach
LINKED, NETWORKED = 0.80, 0.90  # of the rates inside nodes and between them that collectives reach
# of the time that a hidden collective's bytes take inside the node, by which it slows what it hides behind: it takes
# processors and memory bandwidth, both by its bytes
SHARED = 0.25
SPREAD = 0.01  # standard deviation of the nodes' speeds: all wait for the slowest of them
HOP_S = 5e-6  # from one node to the next around a ring
TILE_M, TILE_N = 128, 256  # of a product's result, that one processor computes at a time
FILLING_K = 128  # of a product's inner width, lost at its beginning and end


@dataclass(frozen=True)
class Habits:
    """How a trainer differs from llamatrain. The published rows need it; the default is llamatrain."""

    virtual_stages: int = 1  # of each rank of a pipeline (interleaved schedule)
    tensor_hidden: bool = False  # tensor parallelism's exchanges hide behind products
    repeated: float | None = None  # share of the blocks' products that backward repeats; None: by recompute
    flat_copies: bool = False  # weights arrive where they are used (FSDP1, ZeRO-1), and are not copied there
    optimizer_shared: bool = False  # copies of the weights each update a part of them (ZeRO-1)


LLAMATRAIN = Habits()


def products_peak(config: RunConfig, gpu: Gpu) -> float:
    """FLOP/s of a matrix product in the dtype that the run computes in. Raises ConfigError if it is not known."""
    if element_bytes(config) == 2:
        return gpu.peak
    if gpu.peak_fp32 is None:
        raise ConfigError(
            f"train.precision=fp32 on {gpu.name}: its peak is not known; cluster.hardware.peak_fp32_tflops=…, or "
            "train.precision=bf16"
        )
    return gpu.peak_fp32


@dataclass
class StepTime:
    """Seconds of an optimizer step, by what they go to."""

    products: float = 0.0  # matrix products of the blocks, forward and backward
    repeated: float = 0.0  # those that recompute does again
    attention: float = 0.0
    elementwise: float = 0.0  # norms, rotations, SwiGLU, residual sums
    loss: float = 0.0  # the head's products and what is made of the logits
    copies: float = 0.0  # of weights and gradients, before and after they travel
    optimizer: float = 0.0
    bubble: float = 0.0  # a pipeline filling and emptying
    exposed: dict[str, float] = field(default_factory=dict)  # communication that nothing hides, by axis of the mesh
    slowed: float = 0.0  # computation, by communication that it hides
    waiting: float = 0.0  # for the slowest node

    @property
    def total(self) -> float:
        own = sum(getattr(self, part.name) for part in fields(self) if part.name != "exposed")
        return own + sum(self.exposed.values())


def step_time(
    config: RunConfig, recompute: str, cluster: Cluster, *, world_size: int, habits: Habits = LLAMATRAIN
) -> StepTime:
    """Of the pipeline's slowest stage. Precision and compilation are settled."""
    return _Step(config, recompute, cluster, world_size, habits).time()


@dataclass(frozen=True)
class _Sent:
    """What a collective takes, and what its bytes alone take on the links inside a node."""

    seconds: float
    moved: float

    def __add__(self, other: "_Sent") -> "_Sent":
        return _Sent(self.seconds + other.seconds, self.moved + other.moved)


class _Step:
    def __init__(self, config: RunConfig, recompute: str, cluster: Cluster, world_size: int, habits: Habits) -> None:
        self.config, self.cluster, self.gpu, self.habits = config, cluster, cluster.gpu, habits
        self.model, self.e, self.r = config.model, element_bytes(config), reduced_bytes(config)
        self.peak = products_peak(config, cluster.gpu)
        self.mesh: Layout = layout(config.parallel, world_size)
        self.world_size, self.recompute = world_size, recompute
        self.tokens = config.train.micro_batch * config.data.seq_len / self.mesh.cp  # of a micro-batch, a rank's part
        self.count = micro_batches(config, world_size)
        self.layers = max(map(len, stage_layers(config.model.n_layers, self.mesh.pp)))
        self.shapes = block_shapes(config.model)
        self.block = sum(math.prod(shape) for shape in self.shapes.values())
        self.head = config.model.vocab_size * config.model.dim

    def time(self) -> StepTime:
        """One step."""
        forward, backward = self._block_forward(), self._block_backward()
        layers, count = self.layers, self.count
        one_way, other_way = sum(forward.values()), sum(backward.values())
        waits, slows = self._sharding(one_way, other_way)
        copies_wait, copies_slow = self._all_reduce(one_way, other_way)
        step = StepTime(
            products=count * layers * (forward["products"] + backward["products"]),
            repeated=count * layers * backward["repeated"],
            attention=count * layers * (forward["attention"] + backward["attention"]),
            elementwise=count * layers * (forward["elementwise"] + backward["elementwise"]),
            loss=count * self._loss(),
            copies=self._copies(),
            optimizer=self._optimizer(),
            slowed=slows + copies_slow,
            exposed={"dp_replicate": copies_wait, "dp_shard": waits, "cp": self._context(), "tp": self._tensor()},
        )
        if self.mesh.pp > 1:
            one = (step.total - step.optimizer) / count
            step.bubble = one * (self.mesh.pp - 1) / self.habits.virtual_stages
            step.exposed["pp"] = self._between_stages()
        nodes = math.ceil(self.world_size / self.cluster.gpus_per_node)
        step.waiting = step.total * SPREAD * math.sqrt(2 * math.log(nodes))
        step.exposed = {axis: seconds for axis, seconds in step.exposed.items() if seconds}
        return step

    # computation

    def _product(self, m: float, n: float, k: float) -> float:
        """Seconds of an [m, k] x [k, n]."""
        tiles = math.ceil(m / TILE_M) * math.ceil(n / TILE_N) / self.gpu.processors
        share = self.gpu.reached.products * tiles / (tiles + 0.5) * k / (k + FILLING_K)
        return 2 * m * n * k / (share * self.peak)

    def _linear(self, name: str, times: str) -> float:
        """Seconds of a linear layer's product in forward, or of both in backward."""
        rows, columns = self.shapes[name]
        by_columns = name.split(".")[-2] in ("wo", "w2")
        out = rows if by_columns else rows / self.mesh.tp
        into = columns / self.mesh.tp if by_columns else columns
        if times == "forward":
            return self._product(self.tokens, out, into)
        return self._product(self.tokens, into, out) + self._product(out, into, self.tokens)

    def _products(self, times: str) -> float:
        return sum(self._linear(name, times) for name, shape in self.shapes.items() if len(shape) == 2)

    def _attention_flops(self) -> float:
        """Of one layer's forward on a rank, the half of the matrix that the mask leaves."""
        width = self.model.n_heads * self.model.head_dim / self.mesh.tp
        return 2 * self.tokens * self.config.data.seq_len * width

    def _elements(self) -> dict[str, float]:
        """Bytes that a block's elementwise operations move for each token, in forward and in backward."""
        d, f = self.model.dim / self.mesh.tp, self.model.ffn_width / self.mesh.tp
        rotated = (self.model.n_heads + self.model.kv_heads) * self.model.head_dim / self.mesh.tp
        if self.config.train.compile:  # each operation reads its inputs and writes its outputs, once
            forward = self.e * (2 * 2 * d + 2 * 3 * d + 2 * rotated + 3 * f)
            backward = self.e * (2 * 3 * d + 2 * 3 * d + 2 * rotated + 5 * f)
        else:  # norms and rotations through fp32, an operation at a time
            forward = 2 * 36 * d + 6 * self.e * d + 20 * rotated + 5 * self.e * f
            backward = 2 * 60 * d + 6 * self.e * d + 20 * rotated + 9 * self.e * f
        return {"forward": forward, "backward": backward}

    def _streamed(self, size: float) -> float:
        return size / (STREAMED * self.gpu.bandwidth)

    def _block_forward(self) -> dict[str, float]:
        attention = self._attention_flops() / (self.gpu.reached.attention * self.peak)
        moved = self._streamed(self.tokens * self._elements()["forward"])
        return {"products": self._products("forward"), "attention": attention, "elementwise": moved}

    def _block_backward(self) -> dict[str, float]:
        forward, recompute = self._block_forward(), self.recompute
        share = products_repeated(self.config, recompute) if self.habits.repeated is None else self.habits.repeated
        again = recompute == "full" or (
            recompute == "selective" and "attention" not in self.config.parallel.recompute_save
        )
        moved = self._streamed(self.tokens * self._elements()["backward"])
        return {
            "products": self._products("backward"),
            "repeated": share * forward["products"],
            "attention": forward["attention"] * (2.5 + again),  # five products for two
            "elementwise": moved + (forward["elementwise"] if recompute != "none" else 0.0),
        }

    def _loss(self) -> float:
        """Of a micro-batch, on the last stage alone: the slowest has it."""
        rows = self.model.vocab_size / self.mesh.tp
        tokens, d = self.tokens, self.model.dim
        products = self._product(tokens, rows, d) + self._product(tokens, d, rows) + self._product(rows, d, tokens)
        passes = 5 * self.e if self.config.train.compile else 6 * self.e + 6 * 4
        stages = self.mesh.pp  # layers of other stages take as long
        return products / stages + self._streamed(tokens * rows * passes) / stages

    def _copies(self) -> float:
        """What FSDP moves in memory beside the products: weights as they arrive, gradients before they leave."""
        if self.world_size == 1:
            return 0.0
        local = (self.layers * self.block + self.head) / self.mesh.tp
        flat = self.habits.flat_copies or self.config.parallel.sharding == "fairscale"
        weights = 0.0 if flat or self.mesh.shards == 1 else 2 * self.e
        gathers = 1 if self.config.parallel.reshard_after_forward == "never" else 2
        gradients = self.e + self.r  # read in the one dtype, written in the other
        reductions = self.count if self.config.parallel.reduce_scatter == "each" else 1
        kept = 0 if reductions == self.count else 2 * 4 * (self.count - 1)
        return self._streamed(local * (self.count * gathers * weights + reductions * gradients + kept))

    def _optimizer(self) -> float:
        """Reads weight, gradient and two moments, writes three of them; the norm reads the gradients before."""
        mine = (self.layers * self.block + 2 * self.head / self.mesh.pp) / (self.mesh.tp * self.mesh.shards)
        mine /= self.mesh.dp_replicate if self.habits.optimizer_shared else 1
        return self._streamed(mine * (16 + 12 + 4))

    # communication

    def _ring(self, size: float, ranks: int, stride: int) -> "_Sent":
        """Each of `ranks`, `stride` apart, gets what together is `size` bytes; all groups of ranks do at once."""
        if ranks == 1:
            return _Sent(0.0, 0.0)
        node = self.cluster.gpus_per_node
        inside = min(ranks, max(1, node // stride))  # of a group on one node
        moved = size * (ranks - 1) / ranks / (self.gpu.link * LINKED)
        seconds = moved if inside > 1 else 0.0
        nodes = math.ceil(ranks / inside)
        if nodes > 1:
            groups = node / inside  # that share the network of a node
            carried = groups * size * (nodes - 1) / nodes / (self.cluster.network * NETWORKED)
            seconds = max(seconds, carried) + (nodes - 1) * HOP_S
        return _Sent(seconds, moved)

    def _hidden(self, sent: "_Sent", computed: float) -> tuple[float, float]:
        """Seconds by which computation that takes so long waits for what is sent beside it, and by which it slows."""
        exposed = max(0.0, sent.seconds - computed)
        hidden = 1 - exposed / sent.seconds if sent.seconds else 0.0
        return exposed, SHARED * hidden * min(sent.moved, computed)

    def _sharding(self, forward: float, backward: float) -> tuple[float, float]:
        """Seconds of a step in which computation waits for weights or gradients, and by which it is slowed by them."""
        mesh, parallel, count = self.mesh, self.config.parallel, self.count
        if mesh.shards == 1:
            return 0.0, 0.0
        gather = self._ring(self.e * self.block / mesh.tp, mesh.shards, mesh.tp)
        reduce = self._ring(self.r * self.block / mesh.tp, mesh.shards, mesh.tp)
        again = gather if parallel.reshard_after_forward == "always" else _Sent(0.0, 0.0)
        each = parallel.reduce_scatter == "each"
        exposed = slowed = 0.0
        for times, computed, sent in (
            (count, forward, gather),
            (count if each else 1, backward, again + reduce),
            (0 if each else count - 1, backward, again),
        ):
            waits, slows = self._hidden(sent, computed)
            exposed, slowed = exposed + times * self.layers * waits, slowed + times * self.layers * slows
        # nothing hides the embedding's gather and the first block's, and the embedding's gradient at the end
        ends = (4 + self.e + 2 * self.r) * self.head / mesh.tp / mesh.pp
        return exposed + count * (self._ring(ends, mesh.shards, mesh.tp).seconds + gather.seconds), slowed

    def _all_reduce(self, forward: float, backward: float) -> tuple[float, float]:
        """The same of the copies' gradients, behind the last micro-batch's backward.

        Where copies share the optimizer, gradients are scattered, and weights gathered behind the next forward.
        """
        mesh = self.mesh
        if mesh.dp_replicate == 1:
            return 0.0, 0.0
        mine = (self.layers * self.block + self.head) / (mesh.tp * mesh.shards)
        gradients = self._ring(self.r * mine, mesh.dp_replicate, mesh.tp * mesh.shards)
        weights = self._ring(self.e * mine, mesh.dp_replicate, mesh.tp * mesh.shards)
        if not self.habits.optimizer_shared:
            return self._hidden(gradients + gradients, self.layers * backward)
        waits, slows = self._hidden(gradients, self.layers * backward)
        more_waits, more_slows = self._hidden(weights, self.layers * forward)
        return waits + more_waits, slows + more_slows

    def _tensor(self) -> float:
        """Gathers and scatters of tokens: four a block in forward and in backward, and norms' outputs once more."""
        mesh = self.mesh
        if mesh.tp == 1:
            return 0.0
        size = self.tokens * self.model.dim * self.e
        again = 2 if self.recompute != "none" else 0
        seconds = self.count * self.layers * (8 + again) * self._ring(size, mesh.tp, 1).seconds
        return seconds * (SHARED if self.habits.tensor_hidden else 1.0)

    def _context(self) -> float:
        """Keys and values of whole sequences, in forward and again in backward; their gradients go back in fp32."""
        mesh = self.mesh
        if mesh.cp == 1:
            return 0.0
        size = self.tokens * mesh.cp * 2 * self.model.kv_heads * self.model.head_dim / mesh.tp
        return self.count * self.layers * self._ring(size * (2 * self.e + 4), mesh.cp, mesh.tp).seconds

    def _between_stages(self) -> float:
        """What passes from stage to stage waits for nothing but the first and the last micro-batch."""
        size = self.tokens * self.model.dim * self.e / self.mesh.tp
        network = self.cluster.network * NETWORKED / self.cluster.gpus_per_node
        return 2 * (self.mesh.pp - 1) * self.habits.virtual_stages * size / network
