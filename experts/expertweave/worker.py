"""What the engine asks of each of vLLM's workers (`worker_extension_cls`), between two steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from signalbox.experts.expertweave import weave
from signalbox.experts.expertweave.loading import FolderSource, Loader
from signalbox.experts.expertweave.settings import CannotWeave


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
        return self.expertweave_memory()

    def expertweave_load(self, slot: int, path: str) -> None:
        """Begin to load an adapter's folder, checked before, into a free slot."""
        from signalbox.adapters.base import Limits
        from signalbox.adapters.esft_format import EsftAdapter

        woven, folder = _woven(), Path(path)
        source = EsftAdapter(folder, woven.shape, Limits(roots=(folder,)))
        _loader().begin(slot, FolderSource(source))

    def expertweave_poll(self, slot: int) -> dict[str, Any]:
        """How a load or an unload stands; a load whose experts have all arrived takes effect here."""
        return _loader().poll(slot)

    def expertweave_unload(self, slot: int) -> None:
        """No step from the next one on uses the adapter; its memory is given back beside them."""
        _loader().unload(slot)

    def expertweave_memory(self) -> dict[str, int]:
        """Bytes of pages in use and free for adapters, and rows."""
        return _woven().memory()


def _woven() -> weave.Weave:
    woven = weave.current()
    if woven is None:
        raise CannotWeave("ExpertWeave is not enabled in this engine")
    return woven


_loaders: dict[int, Loader] = {}  # of the current weave, by its identity


def _loader() -> Loader:
    woven = _woven()
    found = _loaders.get(id(woven))
    if found is None:
        _loaders.clear()
        found = _loaders[id(woven)] = Loader(woven)
    return found
