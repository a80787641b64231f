"""Which attention backend a run uses: the one that `model.attention` names, or the faster one for `auto`.

On CUDA xformers and sdpa are each the faster at some shapes, and at some the only one that runs, so auto times both on
the run's own. On the CPU there is nothing to time: xformers has no operator for it, and reference does sdpa's work
through a matrix of all scores, which is there for tests.
"""

import logging
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from llamatrain.config import RunConfig
from llamatrain.device import PRECISIONS, be_deterministic
from llamatrain.errors import ConfigError
from llamatrain.model.attention import Attend

log = logging.getLogger("llamatrain")

CUDA_CANDIDATES = ("xformers", "sdpa")
DOCUMENTS_PER_ROW = 4  # what the run's will be is not known before its data are read
WARM_UP, REPETITIONS = 3, 9

Work = Callable[[], object]


def resolve_backend(config: RunConfig, device: torch.device) -> str:
    """`model.attention` with `auto` decided: xformers, sdpa or reference. Precision is resolved.

    Raises ConfigError if the backend named cannot run, or none can.
    """
    name = config.model.attention
    if name == "auto" and device.type == "cpu":
        return "sdpa"
    if name not in ("auto", "xformers"):
        return name
    if device.type == "cpu":
        raise ConfigError("model.attention=xformers: xformers has no operator for the CPU; set model.attention=sdpa")
    if config.train.deterministic:
        be_deterministic()  # as the run will be: it changes the kernels
    layer = one_layer(config, device)
    if name == "auto":
        name = fastest({backend: partial(layer, backend) for backend in CUDA_CANDIDATES}, time_on_cuda_ms)
    else:
        try:
            layer(name)
        except Exception as error:  # no package, a wrong build, an old GPU: whatever it is, it is the reason
            raise ConfigError(f"model.attention={name} cannot run: {_told(error)}; set model.attention=sdpa") from None
    del layer
    torch.cuda.empty_cache()
    return name


def fastest(candidates: Mapping[str, Work], time_ms: Callable[[Work], float]) -> str:
    """The candidate that takes the least time; one that fails is told and passed over. ConfigError if all fail."""
    times: dict[str, float] = {}
    for name, work in candidates.items():
        try:
            times[name] = time_ms(work)
        except Exception as error:  # as above
            log.warning("attention: %s cannot run here (%s)", name, _told(error))
    if not times:
        raise ConfigError(
            f"model.attention=auto: neither of {', '.join(candidates)} runs on this device, as told above; "
            "model.attention=reference would, slowly"
        )
    best = min(times, key=times.__getitem__)
    told = ", ".join(f"{name} {time:.3f} ms" for name, time in times.items())
    log.info("attention: %s (a layer's forward and backward: %s)", best, told)
    return best


def one_layer(config: RunConfig, device: torch.device) -> Callable[[str], None]:
    """A function of a backend's name: forward and backward of one attention as one micro-batch of the run has it."""
    model, parallel, batch, length = config.model, config.parallel, config.train.micro_batch, config.data.seq_len
    queries = length if parallel.cp == 1 else length // (2 * parallel.cp)
    generator, dtype = torch.Generator(device).manual_seed(0), PRECISIONS[config.train.precision]

    def numbers(tokens: int, heads: int) -> Tensor:
        shape = (batch, tokens, heads // parallel.tp, model.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    q, k, v = numbers(queries, model.n_heads), numbers(length, model.kv_heads), numbers(length, model.kv_heads)
    grad = numbers(queries, model.n_heads)
    ends = [length * i // DOCUMENTS_PER_ROW for i in range(DOCUMENTS_PER_ROW + 1)]
    documents = [end - begin for begin, end in pairwise(ends)] * batch
    doc_lengths = documents if config.data.document_mask else None

    def layer(backend: str) -> None:
        attend = Attend(backend)
        for begin in sorted({0, length - queries}):  # of a shared sequence rank 0 has the first part and the last
            out, saved = attend.forward(q, k, v, doc_lengths=doc_lengths, query_offset=begin)
            attend.backward(grad, q, k, v, out, saved, doc_lengths=doc_lengths, query_offset=begin)

    return layer


def time_on_cuda_ms(work: Work) -> float:
    """The median time of some repetitions, issued one after another as in training."""
    for _ in range(WARM_UP):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPETITIONS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairwise(marks))


def _told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
