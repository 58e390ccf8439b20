"""What the engine asks of each of vLLM's workers (`worker_extension_cls`), between two steps."""

from __future__ import annotations

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
        _loads().stager()
        return self.expertweave_memory()

    def expertweave_load(self, slot: int, path: str) -> None:
        """Begin to load an adapter's folder, checked before, into a free slot."""
        from signalbox.adapters.base import Limits
        from signalbox.adapters.esft_format import EsftAdapter

        folder = Path(path)
        feed = FolderFeed(EsftAdapter(folder, _woven().shape, Limits.of_any_size(folder)), _loads().stager())
        try:
            _loads().loader.begin(slot, feed)
        except BaseException:
            feed.close()
            raise

    def expertweave_poll(self, slot: int) -> dict[str, Any]:
        """Go on with a load and say how it stands; one whose experts have all arrived takes effect here."""
        return _loads().loader.poll(slot)

    def expertweave_unload(self, slot: int) -> None:
        """No step from the next one on uses the adapter; polls until it is gone give its memory back."""
        _loads().loader.unload(slot)

    def expertweave_memory(self) -> dict[str, int]:
        """Bytes of pages in use and free for adapters, and rows."""
        return _woven().memory()


def _woven() -> weave.Weave:
    woven = weave.current()
    if woven is None:
        raise CannotWeave("ExpertWeave is not enabled in this engine")
    return woven


class _Loading:
    """The loads of one model in this process, and the process that reads files for them."""

    def __init__(self, woven: weave.Weave) -> None:
        self.weave, self.loader = woven, Loader(woven)
        self._stager: Stager | None = None

    def stager(self) -> Stager:
        """The staging process; a new one where the last has ended or hangs."""
        if self._stager is not None and not self._stager.alive:
            self.close()
        if self._stager is None:
            widest = sum(
                4 * rows * columns + ALIGNMENT for rows, columns in self.weave.shape.expert_linears.values()
            )  # float32 at most
            self._stager = Stager(widest, pinned=self.weave.device.type == "cuda")
        return self._stager

    def close(self) -> None:
        """End the staging process."""
        if self._stager is not None:
            self._stager.close()
            self._stager = None


_loading: _Loading | None = None  # of the current weave; vLLM's worker has no place for it


def _loads() -> _Loading:
    global _loading
    woven = _woven()
    if _loading is None or _loading.weave is not woven:
        if _loading is not None:  # another model was in this process before: its experts had other shapes
            _loading.close()
        _loading = _Loading(woven)
    return _loading
