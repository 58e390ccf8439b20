"""Where adapters may lie, and the races that somebody who can write there might try."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from signalbox.adapters.base import AdapterError, Limits
from signalbox.adapters.base_shape import base_shape
from signalbox.adapters.files import AdapterFolder
from signalbox.adapters.validate import validate
from tests.adapters.folders import make_lora


def test_no_roots_no_adapters(base: Path, root: Path) -> None:
    with pytest.raises(AdapterError, match="none is configured") as caught:
        validate(make_lora(root / "adapter", base), base_shape(base), Limits(roots=()))
    assert caught.value.code == "outside_roots"


def test_links_inside_the_roots_are_followed(base: Path, tmp_path: Path) -> None:
    """As in the hub's cache, where a snapshot's files are links to blobs."""
    adapter = make_lora(tmp_path / "one" / "blobs", base)
    snapshot = tmp_path / "two" / "snapshot"
    snapshot.mkdir(parents=True)
    for file in adapter.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    (tmp_path / "two" / "latest").symlink_to("snapshot")
    limits = Limits(roots=(tmp_path / "one", tmp_path / "two"))
    facts = validate(tmp_path / "two" / "latest", base_shape(base), limits)
    assert facts.path == str(snapshot)
    with pytest.raises(AdapterError) as caught:  # the blobs are outside of it now
        validate(snapshot, base_shape(base), Limits(roots=(tmp_path / "two",)))
    assert caught.value.code == "outside_roots"


def test_a_root_that_is_a_link_itself(base: Path, tmp_path: Path) -> None:
    make_lora(tmp_path / "real" / "adapter", base)
    (tmp_path / "link").symlink_to("real")
    validate(tmp_path / "link" / "adapter", base_shape(base), Limits(roots=(tmp_path / "link",)))


@pytest.mark.parametrize("path", ["/etc", "/nowhere/at/all", "/root/.ssh/secret", "\0", "/" + "x" * 5000, ""])
def test_nothing_is_said_of_what_lies_outside(path: str, limits: Limits) -> None:
    """Whether it exists, is a folder or may be read: the answer is the same."""
    with pytest.raises(AdapterError) as caught:
        AdapterFolder(path, limits)
    assert caught.value.code == "outside_roots"


def test_a_folder_exchanged_between_the_look_and_the_opening(
    base: Path, tmp_path: Path, root: Path, limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An injected fault: at the moment of opening the weights, the folder becomes a link to a place outside."""
    outside = make_lora(tmp_path / "outside", base)
    inside = make_lora(root / "adapter", base)
    real_open = os.open

    def exchange(path: Any, *arguments: Any, **keywords: Any) -> int:
        if str(path).endswith("adapter_model.safetensors"):  # the last file to be opened
            inside.rename(tmp_path / "moved")
            inside.symlink_to(outside)
        return real_open(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", exchange)
    with pytest.raises(AdapterError) as caught:
        validate(inside, base_shape(base), limits)
    assert caught.value.code == "outside_roots"


def test_size_counts_all_files(base: Path, root: Path) -> None:
    folder = make_lora(root / "adapter", base)
    size = sum(file.stat().st_size for file in folder.iterdir())
    validate(folder, base_shape(base), Limits((root,), max_bytes=size))
    with pytest.raises(AdapterError) as caught:
        validate(folder, base_shape(base), Limits((root,), max_bytes=size - 1))
    assert caught.value.code == "too_large"


def test_other_files_are_left_alone(base: Path, root: Path, limits: Limits) -> None:
    """Such as a trainer leaves: they are never opened."""
    folder = make_lora(root / "adapter", base)
    os.mkfifo(folder / "optimizer.pt")
    (folder / "README.md").symlink_to("/dev/zero")
    (folder / "adapter_model.bin").write_bytes(b"never read")
    validate(folder, base_shape(base), limits)
