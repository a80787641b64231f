"""The learning rate as a pure function of the step (paper, section 2.3: linear warm-up, cosine to 10 %)."""

import math

from llamatrain.config import OptimConfig


def learning_rate(step: int, optim: OptimConfig, *, schedule_steps: int) -> float:
    """Rate of optimizer step `step`, counted from 1.

    Rises linearly to `optim.lr` at step `warmup_steps`, falls along half a cosine to `min_lr_ratio * lr` at
    `schedule_steps` and stays there. Where a run stops plays no part.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if step >= schedule_steps:
        return optim.lr * optim.min_lr_ratio
    progress = (step - optim.warmup_steps) / (schedule_steps - optim.warmup_steps)
    floor = optim.lr * optim.min_lr_ratio
    return floor + (optim.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))
