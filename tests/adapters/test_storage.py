"""The service's own copies: made once, of whole files, and of nothing that has been checked already."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from signalbox.adapters import storage as storage_module
from signalbox.adapters.base import AdapterError, BaseShape, Limits
from signalbox.adapters.base_shape import base_shape
from signalbox.adapters.storage import CopiedAdapters
from signalbox.adapters.validate import validate
from tests.adapters.folders import esft_tensors, make_lora, write_esft


class Counted:
    """A storage, and how often a folder's values were read."""

    def __init__(self, folder: Path, shape: BaseShape, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.shape = folder, shape
        self.reads = 0
        self.storage = CopiedAdapters(folder, shape=lambda _: self.shape, limits=lambda _: limits)

        def counted(*arguments: object) -> object:
            self.reads += 1
            return validate(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(storage_module, "validate", counted)

    def copies(self) -> list[str]:
        return sorted(entry.name for entry in self.folder.iterdir()) if self.folder.is_dir() else []


@pytest.fixture
def counted(moe_base: Path, root: Path, limits: Limits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(tmp_path / "copies", base_shape(moe_base), limits, monkeypatch)


async def test_values_are_read_once_and_untouched_files_never_again(
    counted: Counted, moe_base: Path, root: Path, limits: Limits
) -> None:
    path = write_esft(root / "law", esft_tensors(moe_base))
    facts = await counted.storage.take("moe", str(path))
    assert facts == validate(path, counted.shape, limits) and counted.reads == 1
    assert counted.copies() == [facts.content_hash]
    assert await counted.storage.take("moe", str(path)) == facts and counted.reads == 1
    again = CopiedAdapters(counted.folder, shape=lambda _: counted.shape, limits=lambda _: limits)
    assert await again.take("moe", str(path)) == facts and counted.reads == 1  # the service was started anew
    copy = Path(counted.storage.folder(facts.content_hash))
    assert validate(copy, counted.shape, Limits((counted.folder,))).content_hash == facts.content_hash


async def test_touched_files_are_read_again(counted: Counted, moe_base: Path, root: Path) -> None:
    path = write_esft(root / "law", esft_tensors(moe_base))
    first = await counted.storage.take("moe", str(path))
    file = path / "model-00001-of-00002.safetensors"
    before = file.stat()
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] += 1
    await asyncio.sleep(0.05)  # some kernels' clock of changes goes in steps of 10 ms
    save_file(tensors, file)  # in place: the same inode, the same size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # and the same time
    second = await counted.storage.take("moe", str(path))
    assert second.content_hash != first.content_hash and counted.reads == 2
    assert counted.copies() == sorted([first.content_hash, second.content_hash])
    copy = Path(counted.storage.folder(first.content_hash))
    assert validate(copy, counted.shape, Limits((counted.folder,))).content_hash == first.content_hash


async def test_the_same_content_elsewhere_is_kept_once(counted: Counted, moe_base: Path, root: Path) -> None:
    one = write_esft(root / "one", esft_tensors(moe_base))
    two = write_esft(root / "two", esft_tensors(moe_base), shards=1)
    first, second = await counted.storage.take("moe", str(one)), await counted.storage.take("moe", str(two))
    assert first.content_hash == second.content_hash and second.path == str(two)
    assert counted.copies() == [first.content_hash]


async def test_what_fits_one_base_is_checked_again_for_another(counted: Counted, moe_base: Path, root: Path) -> None:
    path = write_esft(root / "law", esft_tensors(moe_base))
    await counted.storage.take("moe", str(path))
    counted.shape = replace(counted.shape, experts={1: 4, 2: 8})  # the adapter has expert 5 of layer 1
    with pytest.raises(AdapterError, match="from 0 to 3"):
        await counted.storage.take("moe", str(path))


def infinite(path: Path) -> None:
    file = path / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[1, 1] = torch.inf
    save_file(tensors, file)


def cut(path: Path) -> None:
    file = path / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def dangling(path: Path) -> None:
    (path / "notes.json").symlink_to(path / "gone.json")


@pytest.mark.parametrize(
    ("spoil", "code"), [(infinite, "not_finite"), (cut, "bad_safetensors"), (dangling, "unreadable")]
)
async def test_what_is_refused_leaves_nothing(
    counted: Counted, moe_base: Path, root: Path, spoil: Callable[[Path], None], code: str
) -> None:
    path = write_esft(root / "law", esft_tensors(moe_base))
    spoil(path)
    with pytest.raises(AdapterError) as caught:
        await counted.storage.take("moe", str(path))
    assert caught.value.code == code and counted.copies() == []


async def test_what_a_killed_service_left_behind_is_not_believed(counted: Counted, moe_base: Path, root: Path) -> None:
    path = write_esft(root / "law", esft_tensors(moe_base))
    facts = await counted.storage.take("moe", str(path))
    (counted.folder / facts.content_hash).rename(counted.folder / ".new-x")
    assert await counted.storage.take("moe", str(path)) == facts and counted.reads == 2
    (counted.folder / facts.content_hash / ".taken").write_bytes(b"{")
    assert await counted.storage.take("moe", str(path)) == facts and counted.reads == 3


async def test_a_copy_that_was_swept_is_made_again(
    counted: Counted, moe_base: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_esft(root / "law", esft_tensors(moe_base))
    facts = await counted.storage.take("moe", str(path))
    await counted.storage.sweep(set())
    assert counted.copies() == [facts.content_hash]  # its record may be about to be written
    monkeypatch.setattr(storage_module, "KEEP_S", -1.0)
    await counted.storage.sweep({facts.content_hash})
    assert counted.copies() == [facts.content_hash]
    await counted.storage.sweep(set())
    assert counted.copies() == []
    assert await counted.storage.take("moe", str(path)) == facts and counted.copies() == [facts.content_hash]


async def test_nothing_is_swept_while_a_copy_is_made(
    counted: Counted, moe_base: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "KEEP_S", -1.0)
    begun, go_on = threading.Event(), threading.Event()
    copy_to = storage_module._Source.copy_to

    def slowly(source: Any, target: Path) -> None:
        begun.set()
        assert go_on.wait(60)
        copy_to(source, target)

    monkeypatch.setattr(storage_module._Source, "copy_to", slowly)
    taking = asyncio.create_task(counted.storage.take("moe", str(write_esft(root / "law", esft_tensors(moe_base)))))
    assert await asyncio.to_thread(begun.wait, 60)
    await counted.storage.sweep(set())
    go_on.set()
    facts = await taking
    assert counted.copies() == [facts.content_hash]
    await counted.storage.sweep(set())
    assert counted.copies() == []


async def test_lora_is_kept_in_the_same_way(counted: Counted, base: Path, root: Path) -> None:
    counted.shape = base_shape(base)
    path = make_lora(root / "lora", base)
    facts = await counted.storage.take("tiny", str(path))
    assert await counted.storage.take("tiny", str(path)) == facts and counted.reads == 1
    assert facts.kind == "lora" and counted.copies() == [facts.content_hash]
