"""A checkpoint opened as a scorer, on as many ranks as were started.

Ranks meet → the mesh → this rank's part of the model, filled from the checkpoint → the scorer. Of `n` ranks, `tp` share
each layer; `dp_shard` groups of those share one copy of the weights; and there are as many copies as that leaves.
Without tensor parallelism one copy each is the fastest where it fits, since nothing is gathered.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llamatrain.checkpoint import commit
from llamatrain.checkpoint.inference import load_model_for_inference
from llamatrain.config.model import ModelConfig
from llamatrain.config.parallel import Layout, ParallelConfig, check_parallel, layout
from llamatrain.device import PRECISIONS, check_torch, choose_device, choose_precision
from llamatrain.distributed import World
from llamatrain.errors import ConfigError
from llamatrain.evaluation.model_scorer import ModelScorer
from llamatrain.model.llama import Llama
from llamatrain.parallel.answering import answering
from llamatrain.parallel.composition import build_spread
from llamatrain.process import this_process

PATIENCE_S = 24 * 3600  # other ranks wait while the first runs programs that the model has written


@dataclass(frozen=True)
class Opened:
    """A checkpoint and what answers for it."""

    scorer: ModelScorer
    world: World
    model: Llama
    checkpoint: Path
    step: int
    tokens: int  # that the run had read


@contextmanager
def open_scorer(
    checkpoint: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    tp: int = 1,
    dp_shard: int | None = None,
    max_batch_tokens: int | None = None,
) -> Iterator[Opened]:
    """A run's newest checkpoint, or one step's, on all ranks of the launch; each calls this.

    dp_shard: ranks, or tp groups of them, that share one copy of the weights; None: all. Raises LlamatrainError.
    """
    world = World(this_process())
    world.join(ParallelConfig(timeout_s=PATIENCE_S, host_timeout_s=PATIENCE_S))
    opened = open_on(
        world,
        checkpoint,
        device=device,
        precision=precision,
        tp=tp,
        dp_shard=dp_shard,
        max_batch_tokens=max_batch_tokens,
    )
    with answering(opened.model):
        yield opened
    world.leave()


def open_on(
    world: World,
    checkpoint: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    tp: int = 1,
    dp_shard: int | None = None,
    max_batch_tokens: int | None = None,
) -> Opened:
    """`open_scorer` on ranks that have met; the model is still to be put into `parallel.answering`."""
    with world.together():
        check_torch()
        place = choose_device(device, setting="device", local_rank=world.process.local_rank)
        dtype = PRECISIONS[choose_precision(precision, place)]
        parallel = ParallelConfig(dp_shard=dp_shard, dp_replicate=1, tp=tp)
        ranks = mesh_of(parallel, world.size)
    path = world.decide(lambda: commit.find_checkpoint(Path(checkpoint)).absolute())
    manifest = world.decide(lambda: commit.read_manifest(path))

    def build_part(config: ModelConfig) -> Llama:
        check_divides(config, tp)
        return build_spread(config, parallel, ranks, place, compute_dtype=dtype)

    with world.together():
        model, tokenizer = load_model_for_inference(
            path, place, compute_dtype=dtype, build_part=build_part, world=world
        )
    scorer = ModelScorer(model, tokenizer, device=place, world=world, layout=ranks, max_batch_tokens=max_batch_tokens)
    return Opened(scorer, world, model, path, step=manifest["step"], tokens=manifest.get("tokens", 0))


def mesh_of(parallel: ParallelConfig, world_size: int) -> Layout:
    """The mesh of so many ranks, with as many copies of the weights as dp_shard leaves. Raises ConfigError."""
    check_parallel(parallel)
    if parallel.dp_shard is None:
        return layout(parallel, world_size)
    one_copy = parallel.dp_shard * parallel.tp
    if world_size % one_copy:
        raise ConfigError(
            f"dp_shard={parallel.dp_shard} x tp={parallel.tp} makes {one_copy} ranks of one copy of the weights, and "
            f"{world_size} ranks are no multiple of that: change one of the three"
        )
    return Layout(dp_replicate=world_size // one_copy, dp_shard=parallel.dp_shard, tp=parallel.tp)


def check_divides(model: ModelConfig, tp: int) -> None:
    """Raises ConfigError if the model's layers do not divide among tp ranks."""
    sizes = {
        "n_heads": model.n_heads,
        "n_kv_heads": model.kv_heads,
        "feed-forward width": model.ffn_width,
        "vocab_size": model.vocab_size,
    }
    for name, size in sizes.items():
        if size % tp:
            raise ConfigError(f"tp={tp}: the model's {name}, {size}, does not divide among so many ranks")
