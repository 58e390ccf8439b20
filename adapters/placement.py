"""Which replicas hold an adapter, and which adapter makes room when slots are short. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from signalbox.adapters.lifecycle import Record, ReplicaReport, version_id

MIN_RESIDENCY_S = 1.0  # an adapter that was just loaded stays so long: a request that asked for it can use it


def choose_targets(
    before: Sequence[str],
    wanted: int | None,
    live: Mapping[str, ReplicaReport],
    silent: Collection[str],
    shares: Mapping[str, int],
) -> tuple[str, ...]:
    """Ids of the replicas that shall hold a version.

    `wanted` None: all that are live, and those of `before` that are silent for a moment only. Otherwise so many: those
    that were chosen before stay chosen while they are live or briefly silent, others come in by their free slots, which
    `shares` tells: how many versions each replica holds or shall hold.
    """
    kept = [replica for replica in before if replica in live or replica in silent]
    if wanted is None:
        return tuple(sorted({*live, *kept}))
    kept = kept[:wanted]
    others = sorted(
        (report for report in live.values() if report.replica_id not in kept),
        key=lambda report: (shares.get(report.replica_id, 0) - report.max_adapters, report.replica_id),
    )
    return tuple(kept + [report.replica_id for report in others[: wanted - len(kept)]])


def evictable(record: Record) -> bool:
    """Whether an adapter may lose its slots at all: served, not pinned, not being updated or taken away."""
    version = record.serving
    return (
        not (record.pinned or record.evicted or record.removed)
        and version is not None
        and version.phase == "ready"
        and record.staging is None
    )


def choose_victim(
    records: Iterable[Record],
    crowded: ReplicaReport,
    reports: Mapping[str, ReplicaReport],
    in_flight: Mapping[str, int],
    *,
    residency_s: float = MIN_RESIDENCY_S,
) -> Record | None:
    """The least recently used of the adapters on a crowded replica that nobody uses at this moment; None for none.

    `reports` are of all live replicas of the base, `in_flight` the gateways' requests by version id.
    """
    idle: list[tuple[float, str, Record]] = []
    for record in records:
        version = record.serving
        if version is None:
            continue
        vid = version_id(record.name, version.number)
        if not crowded.holds(vid) or in_flight.get(vid, 0):
            continue
        held = [report.adapters[vid] for report in reports.values() if vid in report.adapters]
        if all(h.state == "ready" and not h.in_flight and h.age_s >= residency_s for h in held):
            idle.append((min(h.idle_s for h in held), record.name, record))
    return max(idle, key=lambda entry: entry[:2])[2] if idle else None
