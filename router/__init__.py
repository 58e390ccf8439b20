"""Routers predict: the quality of every expert on a prompt. They know neither prices nor policies."""

from signalbox.router.base import Prediction, Predictor, Prompt, quality_of_loss

__all__ = ["Prediction", "Predictor", "Prompt", "quality_of_loss"]
