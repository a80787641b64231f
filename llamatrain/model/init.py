"""Initial weights that do not depend on how the model is spread over devices.

The number at each place of each parameter is a pure function of (seed, parameter name, place): a
counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), here
SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), and Box-Muller after it. A rank draws just its shard, and
no rank waits for another.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from llamatrain.config.model import ModelConfig
from llamatrain.flat import FlatPart, local_boxes

WRAPPERS = frozenset(("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "module"))
CHUNK = 1 << 20  # numbers drawn at a time: bounds the int64 and float64 temporaries to some tens of MB


def init_weights(model: nn.Module, config: ModelConfig, *, seed: int) -> None:
    """Draw all parameters of a LLaMA, plain or DTensor, in place on their device.

    Normal(0, init_std); wo and w2, which write into the residual stream, times 1/sqrt(2*n_layers) if
    init_depth_scaled; norms 1. Bit-equal for every sharding on one kind of device.
    """
    init_parameters({canonical_name(name): p for name, p in model.named_parameters()}, config, seed=seed)


def init_parameters(parameters: Mapping[str, Tensor | FlatPart], config: ModelConfig, *, seed: int) -> None:
    """`init_weights` of parameters by their names, or of what this rank has of them."""
    for name, parameter in parameters.items():
        for local, offset in local_boxes(parameter):
            if name.endswith("norm.weight"):
                local.fill_(1.0)
            else:
                std = _standard_deviation(name, config)
                fill_normal(local, key=stream_key(seed, name), shape=parameter.shape, offset=offset, std=std)


def canonical_name(name: str) -> str:
    """A parameter's name without what recompute, compile and data-parallel wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def stream_key(seed: int, name: str) -> int:
    """The signed 64-bit key of one parameter's numbers."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def fill_normal(out: Tensor, *, key: int, shape: Sequence[int], offset: Sequence[int], std: float) -> None:
    """Fill `out`, the block at `offset` of a tensor of `shape`, with its part of the key's numbers.

    The numbers are Normal(0, std), drawn in chunks of rows so that the temporaries stay small.
    """
    if out.numel() == 0:
        return
    rows = max(1, CHUNK * out.shape[0] // out.numel())
    for first in range(0, out.shape[0], rows):
        block = out[first : first + rows]
        places = _places(block.shape, shape, (offset[0] + first, *offset[1:]), out.device)
        block.copy_(_normal(places, key).mul_(std))


def _standard_deviation(name: str, config: ModelConfig) -> float:
    into_residual = name.endswith((".wo.weight", ".w2.weight"))
    if into_residual and config.init_depth_scaled:
        return config.init_std / math.sqrt(2 * config.n_layers)
    return config.init_std


def _places(block: Sequence[int], shape: Sequence[int], offset: Sequence[int], device: torch.device) -> Tensor:
    """int64 numbers, in row-major order of the whole tensor, of the places in a block of it."""
    places = torch.zeros((), dtype=torch.int64, device=device)
    for size, first, whole in zip(block, offset, shape, strict=True):
        along = torch.arange(first, first + size, dtype=torch.int64, device=device)
        places = places[..., None] * whole + along
    return places


def _normal(places: Tensor, key: int) -> Tensor:
    """Standard normal numbers in float64, one a place: Box-Muller on the two halves of 64 random bits."""
    bits = _splitmix64(places, key)
    radius = ((_shift_right(bits, 32) + 1).double() * 2.0**-32).log_().mul_(-2.0).sqrt_()  # uniform in (0, 1]
    angle = (bits & 0xFFFFFFFF).double() * (2.0 * math.pi * 2.0**-32)
    return radius.mul_(angle.cos_())


def _splitmix64(counter: Tensor, key: int) -> Tensor:
    """Output number `counter` of SplitMix64 seeded with `key`; int64 products wrap as unsigned ones do."""
    z = (counter + 1) * _signed(0x9E3779B97F4A7C15) + key
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift without copying the sign, which torch's int64 shift does."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
