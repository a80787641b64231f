"""Rotary position embeddings (Su et al., arXiv 2104.09864), in the layout of the released LLaMA code.

Channels 2i and 2i+1 of a head are the real and imaginary part of one number, turned by the angle
position * theta^(-2i/K). The released code multiplies complex numbers; `llamatrain.model.elementwise` does the same in
real arithmetic, by the tables made here.
"""

import torch
from torch import Tensor


def rope_tables(head_dim: int, *, max_seq_len: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all angles, each fp32 [max_seq_len, K/2].

    Always computed on the CPU, in fp32 as in the released code: the same numbers on every device.
    """
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / theta ** (even / head_dim)  # [K/2]
    positions = torch.arange(max_seq_len, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, frequencies)
    return angles.cos(), angles.sin()
