"""What each way to recompute keeps, and what it costs in time, beside what the formulas say.

    python -m tests.benchmarks.bench_recompute

Bytes are those of every storage that the forward made and that is still alive after it, whoever holds it: autograd,
torch's checkpointing or its cache of selected outputs (torch's saved_tensors_hooks see only the first). Times are of
forward and backward on one thread, the modes interleaved, so that a busy moment of the machine hits all alike.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamatrain.arithmetic import activation_bytes_per_token_layer, training_memory
from llamatrain.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from llamatrain.config.parallel import RECOMPUTE, SAVABLE
from llamatrain.device import PRECISIONS
from llamatrain.model.init import init_weights
from llamatrain.model.llama import Llama
from llamatrain.model.loss import cross_entropy_sum
from llamatrain.parallel.recompute import apply_recompute

SHAPE = ModelConfig(
    dim=512, n_layers=4, n_heads=8, ffn_multiple_of=32, vocab_size=1024, max_seq_len=512, attention="sdpa"
)
BATCH = 2


class LiveBytes(TorchDispatchMode):
    """Counts the storages made by operations while it is entered, until they are freed; not those `known` before."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self._known = {x.untyped_storage()._cdata for x in known}
        self._made: dict[int, StorageWeakRef] = {}  # by address, which a weak reference keeps from being used again
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (address := x.untyped_storage()._cdata) not in self._known | self._made.keys():
                self._made[address] = StorageWeakRef(x.untyped_storage())
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        """Bytes of what is alive."""
        # asked anew each time: FSDP2 frees a gathered weight by making its storage small
        found = {at: torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for at, ref in self._made.items()}
        self._made = {at: ref for at, ref in self._made.items() if found[at] is not None}
        return sum(storage.nbytes() for storage in found.values() if storage is not None)


def build(
    shape: ModelConfig, recompute: str, *, save: Sequence[str] = SAVABLE, dtype: torch.dtype = torch.float32
) -> Llama:
    """A model of the shape with its weights in `dtype`, as FSDP2 hands them over: no copies in it are kept."""
    model = Llama(shape, compute_dtype=dtype)
    init_weights(model, shape, seed=0)
    model = model.to(dtype)
    model.rebuild_rope_tables()
    apply_recompute(model, ParallelConfig(recompute=recompute, recompute_save=list(save)))
    return model


def kept_bytes(model: Llama, tokens: Tensor, doc_lengths: Sequence[int] | None = None) -> int:
    """Bytes alive after the forward that were not before, the logits included."""
    with LiveBytes([*model.parameters(), *model.buffers(), tokens]) as live:
        logits = model(tokens, doc_lengths=doc_lengths)
        kept = live.now()
    assert logits.requires_grad
    return kept


def kept_per_token_layer(shape: ModelConfig, recompute: str, *, tokens: Tensor, **options: Any) -> float:
    """By difference of four layers and two, so that what is not the layers' cancels."""
    four, two = (kept_bytes(build(replace(shape, n_layers=layers), recompute, **options), tokens) for layers in (4, 2))
    return (four - two) / 2 / tokens.numel()


def peak_bytes(model: Llama, tokens: Tensor) -> int:
    """The most that is alive at once in a step of two micro-batches, besides the weights; their gradients count."""
    with LiveBytes([*model.parameters(), *model.buffers(), tokens]) as live:
        for _ in range(2):
            logits = model(tokens)
            cross_entropy_sum(logits, tokens).backward()
    return live.peak


def predicted_peak(shape: ModelConfig, recompute: str, *, batch: int, precision: str) -> float:
    """`training_memory` of one process, without the weights and the moments."""
    config = RunConfig(
        model=shape,
        data=DataConfig(seq_len=shape.max_seq_len),
        train=TrainConfig(micro_batch=batch, precision=precision),
    )
    parts = training_memory(config, recompute, world_size=1)
    return sum(parts.values()) - parts["weights, gradients, moments"] * 12 / 16


def seconds(model: Llama, tokens: Tensor) -> float:
    begin = time.process_time()
    cross_entropy_sum(model(tokens), tokens).backward()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=10)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    tokens = torch.randint(SHAPE.vocab_size, (BATCH, SHAPE.max_seq_len), generator=torch.Generator().manual_seed(0))
    print("| | recompute | kept, bytes per token and layer | by formula | peak, MiB | by formula | CPU s | of none |")
    print("|---|---|---|---|---|---|---|---|")
    for precision, dtype in PRECISIONS.items():
        models = {mode: build(SHAPE, mode, dtype=dtype) for mode in RECOMPUTE}
        times: dict[str, list[float]] = {mode: [] for mode in RECOMPUTE}
        for repetition in range(repetitions + 1):
            for mode, model in models.items():
                taken = seconds(model, tokens)
                if repetition:  # the first warms up
                    times[mode].append(taken)
        fastest = statistics.median(times["none"])
        for mode in RECOMPUTE:
            kept = kept_per_token_layer(SHAPE, mode, tokens=tokens, dtype=dtype)
            said = activation_bytes_per_token_layer(SHAPE, mode, bytes_per_element=dtype.itemsize)
            model = Llama(SHAPE, compute_dtype=dtype)  # with weights in fp32, as one process trains
            init_weights(model, SHAPE, seed=0)
            apply_recompute(model, ParallelConfig(recompute=mode))
            peak = peak_bytes(model, tokens) / 2**20
            foreseen = predicted_peak(SHAPE, mode, batch=BATCH, precision=precision) / 2**20
            median = statistics.median(times[mode])
            print(
                f"| {precision} | {mode} | {kept:,.0f} | {said:,.0f} | {peak:,.0f} | {foreseen:,.0f} "
                f"| {median:.2f} | {median / fastest:.2f} |"
            )


if __name__ == "__main__":
    main()
