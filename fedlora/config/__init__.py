"""What a run is: typed, from YAML and dotted keys; the source of the command line, of overrides and of the docs."""

from fedlora.config.data import DataConfig, PartitionConfig
from fedlora.config.model import ModelConfig
from fedlora.config.run import (
    EvaluationConfig,
    RunConfig,
    RunnerConfig,
    TrackingConfig,
    TrainingConfig,
)
from fedlora.sections import Section

__all__ = [
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "PartitionConfig",
    "RunConfig",
    "RunnerConfig",
    "Section",
    "TrackingConfig",
    "TrainingConfig",
]
