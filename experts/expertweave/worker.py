"""What the engine asks of each of vLLM's workers (`worker_extension_cls`), between two steps."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from signalbox.experts.expertweave import weave
from signalbox.experts.expertweave.experts import warm_up
from signalbox.experts.expertweave.loading import Loader
from signalbox.experts.expertweave.settings import CannotWeave
from signalbox.experts.expertweave.stage import ALIGNMENT
from signalbox.experts.expertweave.staging import FolderFeed, Stager


class ExpertWeaveWorker:
    """Methods added to vLLM's worker; all answers are plain values."""

    def expertweave_check(self) -> dict[str, Any]:
        """What is woven. Raises `CannotWeave` where the model has nothing that an ESFT adapter could replace."""
        woven = weave.current()
        if woven is None or not woven.layers:
            raise CannotWeave(
                "the model has no routed experts that ESFT adapters could replace: it is no mixture of experts, or its "
                "experts are quantised"
            )
        woven.seal()
        warm_up(woven)
        _stager()
        return self.expertweave_memory()

    def expertweave_load(self, slot: int, path: str) -> None:
        """Begin to load an adapter's folder, checked before, into a free slot."""
        from signalbox.adapters.base import Limits
        from signalbox.adapters.esft_format import EsftAdapter

        folder = Path(path)
        feed = FolderFeed(EsftAdapter(folder, _woven().shape, Limits(roots=(folder,))), _stager())
        try:
            _loader().begin(slot, feed)
        except BaseException:
            feed.close()
            raise

    def expertweave_poll(self, slot: int) -> dict[str, Any]:
        """Go on with a load and say how it stands; one whose experts have all arrived takes effect here."""
        return _loader().poll(slot)

    def expertweave_unload(self, slot: int) -> None:
        """No step from the next one on uses the adapter; polls until it is gone give its memory back."""
        _loader().unload(slot)

    def expertweave_memory(self) -> dict[str, int]:
        """Bytes of pages in use and free for adapters, and rows."""
        return _woven().memory()


def _woven() -> weave.Weave:
    woven = weave.current()
    if woven is None:
        raise CannotWeave("ExpertWeave is not enabled in this engine")
    return woven


@lru_cache(maxsize=1)
def _loader_of(woven: weave.Weave) -> Loader:
    return Loader(woven)


def _loader() -> Loader:
    return _loader_of(_woven())


_stagers: list[Stager] = []  # none or one; vLLM's worker has no place for it


def _stager() -> Stager:
    woven = _woven()
    if _stagers and not _stagers[0].alive:
        _stagers.pop().close()
    if not _stagers:
        widest = sum(
            4 * rows * columns + ALIGNMENT for rows, columns in woven.shape.expert_linears.values()
        )  # float32 at most
        _stagers.append(Stager(widest, pinned=woven.device.type == "cuda"))
    return _stagers[0]
