"""What to sample, and how."""

from dataclasses import dataclass

from llamatrain.config.train import DEVICES, PRECISIONS
from llamatrain.errors import ConfigError


@dataclass
class GenerateConfig:
    checkpoint: str | None = None  # a run's directory (its newest checkpoint) or one step-… directory
    prompt: str | list[str] = ""  # a text, or a list of texts
    max_new_tokens: int | None = None  # per prompt; null: 128, or as many as the model's length leaves
    temperature: float = 0.8  # 0: always the likeliest token
    top_p: float = 0.95  # draw from the fewest likeliest tokens that hold this probability; 1: from all
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "auto"  # bf16 | fp32; auto: bf16 on CUDA, fp32 on CPU

    @property
    def prompts(self) -> list[str]:
        return self.prompt if isinstance(self.prompt, list) else [self.prompt]


def check_generate(config: GenerateConfig) -> None:
    """Raises ConfigError."""
    if not config.checkpoint:
        raise ConfigError("no checkpoint to generate from: give checkpoint=RUN_OR_STEP_DIRECTORY")
    if not config.prompts:
        raise ConfigError("prompt=[]: give a text, or a list like prompt=[one,two]")
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"seed={config.seed}: must lie in [0, 2^63)")
    if config.max_new_tokens is not None and config.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={config.max_new_tokens}: must be at least 1")
    if not config.temperature >= 0:
        raise ConfigError(f"temperature={config.temperature}: must be 0 (take the likeliest token) or more")
    if not 0 < config.top_p <= 1:
        raise ConfigError(f"top_p={config.top_p}: must be above 0 and at most 1")
    if config.device not in DEVICES:
        raise ConfigError(f"device={config.device}: choose one of {', '.join(DEVICES)}")
    if config.precision not in PRECISIONS:
        raise ConfigError(f"precision={config.precision}: choose one of {', '.join(PRECISIONS)}")
