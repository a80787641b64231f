"""The training loss: a sum over tokens, so that any micro-batching or sharding adds up to the same number.

The caller divides by the number of valid targets in the global batch.
"""

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # targets with this value carry no loss


def cross_entropy_sum(logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Sum of -log p(target) in nats over the targets that are not `ignore_index`: an fp32 scalar.

    logits [B, T, V] of any float dtype (the loss computes in fp32), targets int64 [B, T]. No valid target: 0.
    """
    flat = logits.flatten(0, 1).float()  # [B*T, V]
    return F.cross_entropy(flat, targets.flatten(), ignore_index=ignore_index, reduction="sum")
