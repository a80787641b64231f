"""What every contender is given: a model's shape, tokens, and how the arithmetic is to be done.

Every side keeps fp32 weights and moments; `precision` is what the matrix products compute in.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from torch import Tensor

from llamatrain.arithmetic import flops_per_token
from llamatrain.cli import config_directory
from llamatrain.config import ModelConfig, OptimConfig
from llamatrain.config.build import build

OPTIM = OptimConfig(warmup_steps=0, schedule_steps=1_000_000)

Setting = dict[str, Any]  # what a contender may choose for itself; ours by the names of its configuration


@dataclass(frozen=True)
class Workload:
    model: ModelConfig = field(default_factory=ModelConfig)
    seq_len: int = 512
    micro_batch: int = 4
    micro_batches: int = 1  # of an optimizer step
    precision: str = "fp32"
    device: str = "cpu"

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batches * self.micro_batch * self.seq_len

    @property
    def flops_per_token(self) -> int:
        """Forward and backward, PaLM convention."""
        return flops_per_token(self.model, self.seq_len)

    def rows(self, step: int) -> Tensor:
        """The windows of a step, int64 [R, T+1]: the same for every contender."""
        shape = (self.micro_batches * self.micro_batch, self.seq_len + 1)
        rows = torch.randint(self.model.vocab_size, shape, generator=torch.Generator().manual_seed(step))
        return rows.to(self.device)

    def describe(self) -> str:
        m = self.model
        tied = ", tied" if m.tied_embeddings else ""
        return (
            f"width {m.dim}, {m.n_layers} layers, {m.n_heads} heads, FFN {m.ffn_width}, vocabulary {m.vocab_size:,}"
            f"{tied}; a step is {self.micro_batches} x {self.micro_batch} x {self.seq_len:,} tokens"
        )


def preset(name: str, **changes: Any) -> ModelConfig:
    """A preset of conf/model with some settings of its own."""
    values = yaml.safe_load((config_directory() / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    return build(ModelConfig, values | changes)


def describe(setting: Setting) -> str:
    """As one would type it, the group's name left out."""
    return " ".join(f"{key.rpartition('.')[2]}={str(value).lower()}" for key, value in setting.items()) or "as it comes"
