"""What each way to recompute keeps, and what it costs in time, beside what the formulas say.

    python -m tests.benchmarks.bench_recompute

Bytes kept are those that the forward allocated and did not free, whoever holds them: autograd, torch's checkpointing
or its cache of selected outputs (torch's saved_tensors_hooks see only the first). Times are of forward and backward on
one thread, the modes, eager and compiled, interleaved, so that a busy moment of the machine hits all alike.
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
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamatrain.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from llamatrain.config.parallel import RECOMPUTE, SAVABLE
from llamatrain.device import PRECISIONS
from llamatrain.memory import activation_bytes_per_token_layer, training_memory
from llamatrain.model.compilation import apply_compile
from llamatrain.model.init import init_weights
from llamatrain.model.llama import Llama
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
    shape: ModelConfig,
    recompute: str,
    *,
    save: Sequence[str] = SAVABLE,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Llama:
    """A model of the shape with its weights in `dtype`, as FSDP2 hands them over: no copies in it are kept."""
    model = Llama(shape, compute_dtype=dtype)
    init_weights(model, shape, seed=0)
    model = model.to(dtype)
    model.rebuild_rope_tables()
    apply_recompute(model, ParallelConfig(recompute=recompute, recompute_save=list(save)))
    if compiled:
        apply_compile(model)
    return model


def kept_bytes(model: Llama, tokens: Tensor, doc_lengths: Sequence[int] | None = None) -> int:
    """Bytes alive after the forward that were not before, the logits included.

    By every allocation that the profiler saw: no dispatch mode sees into kernels of torch.compile.
    """
    model(tokens, doc_lengths=doc_lengths)  # compiles
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        logits = model(tokens, doc_lengths=doc_lengths)
    assert logits.requires_grad and record.profiler is not None and record.profiler.kineto_results is not None
    return sum(event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]")


def kept_per_token_layer(shape: ModelConfig, recompute: str, *, tokens: Tensor, **options: Any) -> float:
    """By difference of four layers and two, so that what is not the layers' cancels."""
    four, two = (kept_bytes(build(replace(shape, n_layers=layers), recompute, **options), tokens) for layers in (4, 2))
    return (four - two) / 2 / tokens.numel()


def peak_bytes(model: Llama, tokens: Tensor) -> int:
    """The most that is alive at once in a step of two micro-batches, besides the weights; their gradients count."""
    with LiveBytes([*model.parameters(), *model.buffers(), tokens]) as live:
        for _ in range(2):
            model(tokens, targets=tokens).backward()
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
    model(tokens, targets=tokens).backward()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=10)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    tokens = torch.randint(SHAPE.vocab_size, (BATCH, SHAPE.max_seq_len), generator=torch.Generator().manual_seed(0))
    print("| | recompute | kept, bytes per token and layer | by formula | peak, MiB | by formula | CPU s | of none |")
    print("|---|---|---|---|---|---|---|---|")
    ways = [(mode, compiled) for compiled in (False, True) for mode in RECOMPUTE]
    for precision, dtype in PRECISIONS.items():
        models = {(mode, compiled): build(SHAPE, mode, dtype=dtype, compiled=compiled) for mode, compiled in ways}
        times: dict[tuple[str, bool], list[float]] = {way: [] for way in ways}
        for repetition in range(repetitions + 1):
            for way, model in models.items():
                taken = seconds(model, tokens)
                if repetition:  # the first warms up
                    times[way].append(taken)
        for mode, compiled in ways:
            kept = kept_per_token_layer(SHAPE, mode, tokens=tokens, dtype=dtype, compiled=compiled)
            size = dtype.itemsize
            said = activation_bytes_per_token_layer(SHAPE, mode, bytes_per_element=size, compiled=compiled)
            median = statistics.median(times[mode, compiled])
            of_none = statistics.median(
                taken / none for taken, none in zip(times[mode, compiled], times["none", False], strict=True)
            )
            name, peak = (f"{mode}, compiled", "| | |") if compiled else (mode, _peak(mode, tokens, precision))
            print(
                f"| {precision} | {name} | {kept:,.0f} | {said:,.0f} {peak} {median:.2f} | {of_none:.2f} |", flush=True
            )


def _peak(mode: str, tokens: Tensor, precision: str) -> str:
    """Two cells: the peak of a step, measured and by formula."""
    model = Llama(SHAPE, compute_dtype=PRECISIONS[precision])  # with weights in fp32, as one process trains
    init_weights(model, SHAPE, seed=0)
    apply_recompute(model, ParallelConfig(recompute=mode))
    measured = peak_bytes(model, tokens)
    foreseen = predicted_peak(SHAPE, mode, batch=BATCH, precision=precision)
    return f"| {measured / 2**20:,.0f} | {foreseen / 2**20:,.0f} |"


if __name__ == "__main__":
    main()
