"""From an expert's configuration to its engine."""

from __future__ import annotations

from signalbox.experts.base import Engine
from signalbox.experts.catalog import OpenAIExpert, TransformersExpert


def build_engine(name: str, config: TransformersExpert | OpenAIExpert) -> Engine:
    """The engine of an expert, not started yet. Imports just what that kind of engine needs."""
    if isinstance(config, TransformersExpert):
        from signalbox.experts.transformers_engine import TransformersEngine

        return TransformersEngine(name, config)
    from signalbox.experts.openai_engine import OpenAIEngine

    return OpenAIEngine(name, config)
