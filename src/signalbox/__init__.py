"""Signalbox: routers predict, policies decide, experts generate."""

__version__ = "0.1.0"
