"""The steps of an adapter's life as pure functions from record to record.

Each gets the record as it is now and returns what it becomes, or the same record where the step does not apply any
more: between a decision and its writing, others may have changed the record. `at` is Unix seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from signalbox.adapters.base import AdapterError, AdapterFacts, Phase
from signalbox.adapters.lifecycle import Record, Version, version_id
from signalbox.adapters.registry_protocols import RegistryError

log = logging.getLogger(__name__)


def conflict(message: str) -> RegistryError:
    """The refusal of what does not go together with what there is (HTTP 409)."""
    return RegistryError(message, code="conflict", status=409)


def not_found(name: str) -> RegistryError:
    """The refusal of a name that is not registered (HTTP 404)."""
    return RegistryError(f"there is no adapter '{name[:64]}'", code="adapter_not_found", status=404)


def _note(record: Record, at: float, phase: Phase, reason: str, number: int) -> Record:
    log.info("adapter %s: %s %s", version_id(record.name, number), phase, reason)
    return record.with_event(at, phase, reason, number)


def _drain(record: Record, version: Version, reason: str) -> Record:
    return record.with_version(replace(version, phase="draining", reason=reason, targets=()))


# -- from files to a staged version ---------------------------------------------------------------------------------


def begin(record: Record, path: str, at: float) -> Record:
    """A version whose files are being checked."""
    return record.with_version(Version(record.number + 1, "validating", path, at))


def drop(record: Record | None, number: int) -> Record | None:
    """Without a version that was being checked, which nothing has loaded."""
    version = record.version(number) if record is not None else None
    if record is None or version is None or version.phase != "validating":
        return record
    return record.without_version(number)


def refuse(record: Record | None, number: int, error: AdapterError, at: float, *, keep: bool) -> Record | None:
    """The files are at fault; with `keep` the version stays, failed, for those who look later."""
    version = record.version(number) if record is not None else None
    if record is None or version is None:
        return record
    if keep:
        failed = replace(version, phase="failed", reason=error.message, code=error.code, tensor=error.tensor)
        return _note(record.with_version(failed), at, "failed", error.message, number)
    return _note(record.without_version(number), at, "failed", f"an update was refused: {error.message}", number)


def stage(
    record: Record | None,
    number: int,
    facts: AdapterFacts,
    at: float,
    *,
    replicas: int | None,
    pinned: bool,
    origin: str,
) -> Record:
    """The files are ours and checked: load them everywhere. Raises `RegistryError` where it was removed meanwhile.

    The newest registration wins. Content that the name serves or stages already is not a new version.
    """
    version = record.version(number) if record is not None else None
    if record is None or version is None:
        raise conflict("the adapter was removed while it was being checked")
    newer = [v.number for v in record.versions if v.number > number and v.phase in ("staged", "ready")]
    if newer:
        reason = f"superseded by version {max(newer)}"
        gone = replace(version, phase="gone", reason=reason, content_hash=facts.content_hash)
        return _note(record.with_version(gone), at, "gone", reason, number)
    record = replace(record, replicas=replicas, pinned=pinned, origin=origin, removed=False)
    staging, serving = record.staging, record.serving
    if staging is not None and staging.content_hash == facts.content_hash:
        return record.without_version(number)
    if staging is not None:
        record = _drain(record, staging, f"superseded by version {number}")
    if serving is not None and serving.content_hash == facts.content_hash:
        return replace(record.without_version(number), evicted=False)
    version = replace(
        version,
        phase="staged",
        reason="waiting for replicas to load it",
        content_hash=facts.content_hash,
        kind=facts.kind,
        rank=facts.rank,
        nbytes=facts.nbytes,
    )
    return _note(record.with_version(version), at, "staged", "", number)


# -- service --------------------------------------------------------------------------------------------------------


def retarget(record: Record | None, number: int, targets: tuple[str, ...]) -> Record | None:
    """Other replicas shall hold the version."""
    version = record.version(number) if record is not None else None
    if record is None or version is None or version.phase not in ("staged", "ready"):
        return record
    return record.with_version(replace(version, targets=targets))


def serve(
    record: Record | None,
    number: int,
    targets: tuple[str, ...],
    holders: tuple[str, ...],
    at: float,
    *,
    complete: bool,
) -> Record | None:
    """The version answers its name, by these holders; the one before drains. `complete`: all targets hold it."""
    version = record.version(number) if record is not None else None
    if record is None or version is None or version.phase not in ("staged", "ready"):
        return record
    switching = number != record.current
    if (switching and record.staging != version) or (record.evicted and not switching):
        return record
    phase, reason, loaded_at = version.phase, version.reason, version.loaded_at
    if complete:
        phase, reason, loaded_at = "ready", "", loaded_at or at
    elif not holders:
        phase, reason = "staged", f"no replica of '{record.base}' holds it: being loaded again"
    if switching and record.serving is not None:
        record = _drain(record, record.serving, f"replaced by version {number}")
    lost = () if switching else sorted(set(record.holders) - set(holders))
    record = replace(record, current=number, holders=holders, evicted=record.evicted and not switching)
    record = record.with_version(replace(version, phase=phase, reason=reason, targets=targets, loaded_at=loaded_at))
    if lost:
        record = _note(record, at, phase, f"lost on {', '.join(lost)}", number)
    if phase == "ready" and version.phase != "ready":
        record = _note(record, at, "ready", f"on {', '.join(holders)}", number)
    return record


def fail(
    record: Record | None, number: int, reason: str, at: float, *, code: str | None = None, tensor: str | None = None
) -> Record | None:
    """A replica refuses the version: it has failed, or, where it was ready once, that is an event."""
    version = record.version(number) if record is not None else None
    if record is None or version is None or version.phase not in ("staged", "ready"):
        return record
    if version.loaded_at is None:
        ended = replace(version, phase="failed", reason=reason, code=code, tensor=tensor, targets=())
        return _note(record.with_version(ended), at, "failed", reason, number)
    if record.events and record.events[-1].reason == reason[:400]:
        return record
    return _note(record, at, version.phase, reason, number)


def evict(record: Record | None, number: int, reason: str, at: float) -> Record | None:
    """The current version loses its slots; it comes back when it is asked for."""
    version = record.serving if record is not None else None
    if record is None or version is None or version.number != number or record.evicted:
        return record
    version = replace(version, phase="staged", reason=f"evicted: {reason}", targets=())
    record = replace(record, evicted=True, holders=()).with_version(version)
    return _note(record, at, "staged", version.reason, number)


def recall(record: Record | None, name: str, at: float) -> Record:
    """An evicted adapter is asked for. Raises `RegistryError` (404) where the name has none."""
    version = record.serving if record is not None else None
    if record is None or version is None or record.removed:
        raise not_found(name)
    if not record.evicted:
        return record
    version = replace(version, reason="asked for: being loaded again")
    return _note(replace(record, evicted=False).with_version(version), at, "staged", "asked for", version.number)


# -- the end --------------------------------------------------------------------------------------------------------


def remove(record: Record | None, name: str, at: float) -> Record:
    """No request gets the adapter from here on; all its versions drain. Raises `RegistryError` (404)."""
    if record is None:
        raise not_found(name)
    if record.removed and not any(v.phase in ("validating", "staged", "ready") for v in record.versions):
        return record
    record = replace(record, removed=True, current=None, holders=(), evicted=False)
    last = record.number
    for version in record.versions:
        if version.phase == "validating":
            record = record.without_version(version.number)
        elif version.phase in ("staged", "ready"):
            record = _drain(record, version, "removed")
    return _note(record, at, "draining", "removed", last)


def end(record: Record | None, number: int, at: float) -> Record | None:
    """A draining version is nowhere any more."""
    version = record.version(number) if record is not None else None
    if record is None or version is None or version.phase != "draining":
        return record
    return _note(record.with_version(replace(version, phase="gone")), at, "gone", version.reason, number)


def forget(record: Record | None) -> Record | None:
    """A removed name goes once all its versions have."""
    if record is not None and record.removed and all(v.phase in ("gone", "failed") for v in record.versions):
        return None
    return record


def numbers_held(name: str, versions: Sequence[tuple[str, int]]) -> int:
    """The greatest number of a name among versions that replicas hold; 0 for none."""
    return max((number for held, number in versions if held == name), default=0)
