"""Experts generate: the catalogue, the `Engine` protocol, and the messages between gateway and engine."""

from signalbox.experts.base import (
    Chunk,
    Engine,
    EngineState,
    ExpertError,
    GenerateRequest,
    SamplingParams,
    Score,
    Usage,
)
from signalbox.experts.catalog import (
    ExpertConfig,
    OpenAIExpert,
    Price,
    SimulatedExpert,
    TransformersExpert,
    VllmExpert,
)

__all__ = [
    "Chunk",
    "Engine",
    "EngineState",
    "ExpertConfig",
    "ExpertError",
    "GenerateRequest",
    "OpenAIExpert",
    "Price",
    "SamplingParams",
    "Score",
    "SimulatedExpert",
    "TransformersExpert",
    "Usage",
    "VllmExpert",
]
