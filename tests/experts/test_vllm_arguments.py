"""`engine_args` against the installed vLLM, whose source a small stand-in package replaces here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from signalbox.experts import vllm_arguments
from signalbox.serving.config import ConfigError, load_config

# A stand-in for the file of vLLM that is read: it must not be imported, and says so.
SOURCE = """
raise ImportError("read me, do not run me")
class EngineArgs:
    model: str = "x"
    max_num_batched_tokens: int | None = None
    seed: int = 0
class AsyncEngineArgs(EngineArgs):
    enable_log_requests: bool = False
class Other:
    not_an_argument: int = 0
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if vllm_arguments.installed():
        pytest.skip("vLLM itself is here; test_vllm_engine.py reads its arguments")
    folder = tmp_path / "packages" / "vllm" / "engine"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError")
    (folder / "arg_utils.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    vllm_arguments.engine_argument_names.cache_clear()
    yield
    vllm_arguments.engine_argument_names.cache_clear()


def test_names_are_read_from_the_source(stand_in: None) -> None:
    assert vllm_arguments.engine_argument_names() == {"model", "max_num_batched_tokens", "seed", "enable_log_requests"}


def write(folder: Path, arguments: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(f"experts:\n  a:\n    engine: vllm\n    model: hf:a/b\n    engine_args: {arguments}\n")
    return path


def test_an_unknown_argument_stops_the_check_with_the_nearest(stand_in: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "{max_num_batched_token: 1, max_num_seqs: 4, trust_remote_code: true}"))
    first, second, third = caught.value.messages
    assert "c.yaml:5: experts.a.engine_args.max_num_batched_token: vLLM has no such argument" in first
    assert "did you mean 'max_num_batched_tokens'?" in first
    assert "set by the expert's own field 'max_running'" in second
    assert "never code" in third


def test_without_vllm_names_pass_and_a_warning_is_given(tmp_path: Path) -> None:
    if vllm_arguments.installed():
        pytest.skip("vLLM is here")
    warnings: list[str] = []
    load_config(write(tmp_path, "{anything: 1}"), on_warning=warnings.append)
    assert any("vLLM is not installed here" in warning for warning in warnings)
