"""Predict."""

from signalbox.router.base import Prediction, Predictor, Prompt, quality_of_loss

__all__ = ["Prediction", "Predictor", "Prompt", "quality_of_loss"]
