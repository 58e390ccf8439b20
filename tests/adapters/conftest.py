"""Bases for the adapters' tests: a tiny Llama with random weights, and the shape of a tiny mixture of experts."""

from __future__ import annotations

from pathlib import Path

import pytest

from signalbox.adapters.base import Limits
from tests.adapters.folders import make_moe_base
from tests.tiny_models import save_tiny


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def moe_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe_base(tmp_path_factory.mktemp("base") / "moe")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The one allowed root of a test."""
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def limits(root: Path) -> Limits:
    return Limits(roots=(root,))
