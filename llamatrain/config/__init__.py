"""The schema of a run: dataclasses with their checks. No torch, no Hydra."""

from llamatrain.config.checkpoint import CheckpointConfig
from llamatrain.config.data import DataConfig, SourceConfig
from llamatrain.config.evaluation import EvaluationConfig
from llamatrain.config.init import InitConfig
from llamatrain.config.logging import LoggingConfig
from llamatrain.config.model import ModelConfig
from llamatrain.config.optim import OptimConfig
from llamatrain.config.parallel import ParallelConfig
from llamatrain.config.resilience import ResilienceConfig
from llamatrain.config.run import RunConfig, validate
from llamatrain.config.train import TrainConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "InitConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ResilienceConfig",
    "RunConfig",
    "SourceConfig",
    "TrainConfig",
    "validate",
]
