"""What to sample, and how."""

from dataclasses import dataclass
from typing import Any

from llamatrain.config.train import DEVICES, PRECISIONS
from llamatrain.errors import ConfigError


@dataclass
class GenerateConfig:
    checkpoint: str | None = None  # a run's directory (its newest checkpoint) or one step-… directory
    prompt: Any = ""  # a text, or a list of texts
    max_new_tokens: int = 128  # per prompt
    temperature: float = 0.8  # 0: always the likeliest token
    top_p: float = 0.95  # draw from the fewest likeliest tokens that hold this probability; 1: from all
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "auto"  # bf16 | fp32; auto: bf16 on CUDA, fp32 on CPU

    @property
    def prompts(self) -> list[str]:
        """The prompts as texts; YAML may have read some as numbers."""
        given = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        return [str(prompt) for prompt in given]


def check_generate(config: GenerateConfig) -> None:
    """Raises ConfigError."""
    if not config.checkpoint:
        raise ConfigError("no checkpoint to generate from: give checkpoint=RUN_OR_STEP_DIRECTORY")
    given = config.prompt if isinstance(config.prompt, list) else [config.prompt]
    if not given or not all(isinstance(prompt, str | int | float) for prompt in given):
        raise ConfigError(f"prompt={config.prompt!r}: must be a text or a list like prompt=[one,two]")
    if config.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={config.max_new_tokens}: must be at least 1")
    if not config.temperature >= 0:
        raise ConfigError(f"temperature={config.temperature}: must be 0 (take the likeliest token) or more")
    if not 0 < config.top_p <= 1:
        raise ConfigError(f"top_p={config.top_p}: must be above 0 and at most 1")
    if config.device not in DEVICES:
        raise ConfigError(f"device={config.device}: choose one of {', '.join(DEVICES)}")
    if config.precision not in PRECISIONS:
        raise ConfigError(f"precision={config.precision}: choose one of {', '.join(PRECISIONS)}")
