"""Adapter formats, their registry and their training."""
