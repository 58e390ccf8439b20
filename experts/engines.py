"""From an expert's configuration to its engine."""

from __future__ import annotations

from signalbox.experts.base import Engine
from signalbox.experts.catalog import ExpertConfig, SimulatedExpert, TransformersExpert, VllmExpert


def build_engine(name: str, config: ExpertConfig) -> Engine:
    """The engine of an expert, not started yet. Imports just what that kind of engine needs."""
    if isinstance(config, TransformersExpert):
        from signalbox.experts.transformers_engine import TransformersEngine

        return TransformersEngine(name, config)
    if isinstance(config, VllmExpert):
        from signalbox.experts.vllm_engine import VllmEngine

        return VllmEngine(name, config)
    if isinstance(config, SimulatedExpert):
        from signalbox.experts.simulated_engine import SimulatedEngine

        return SimulatedEngine(name, config)
    from signalbox.experts.openai_engine import OpenAIEngine

    return OpenAIEngine(name, config)
