"""The record of an adapter's life, and what may be said of it.

A name has a record; each content that was registered under the name is a version of it, with a number that never comes
again for that name. `banking@3` is the version's id, which engines know it by. What is true of a replica is only what
the replica itself says (`ReplicaReport`): `describe` never says `ready` on the word of the record alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import orjson

from signalbox.adapters.base import Phase

MAX_EVENTS = 32  # kept of each adapter, the newest
MAX_NUMBERS = 1024  # names that are gone, whose last number is kept
MAX_VERSIONS = 16  # kept of each adapter: those in use, and the newest of the others
ACTIVE: frozenset[Phase] = frozenset({"validating", "staged", "ready", "draining"})
ENDED: frozenset[Phase] = frozenset({"gone", "failed"})

HoldingState = Literal["loading", "ready", "unloading"]
_SHOWN: dict[str, Phase] = {"loading": "staged", "ready": "ready", "unloading": "draining"}
_ID = re.compile(r"(.+)@(\d{1,15})")


def version_id(name: str, number: int) -> str:
    """`banking@3`."""
    return f"{name}@{number}"


def split_id(version: str) -> tuple[str, int]:
    """Name and number of a version id. Raises `ValueError` where it is none."""
    found = _ID.fullmatch(version)
    if found is None:
        raise ValueError(f"not a version id: {version[:80]!r}")
    return found[1], int(found[2])


# -- what a replica says --------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Holding:
    """One version on one replica. `ready`: loaded, and it has answered a canary request.

    `in_flight` requests run or wait; `idle_s` seconds ago the last one ended (or it was loaded), `age_s` seconds ago it
    became ready. `nbytes` of its tensors as stored.
    """

    state: HoldingState
    content_hash: str = ""
    nbytes: int = 0
    in_flight: int = 0
    idle_s: float = 0.0
    age_s: float = 0.0


@dataclass(slots=True, frozen=True)
class ReplicaReport:
    """What a replica holds at this moment. `nonce` changes with each start of its engine, which forgets adapters."""

    replica_id: str
    nonce: str
    ready: bool
    reason: str = ""
    max_adapters: int = 0
    adapters: Mapping[str, Holding] = field(default_factory=dict)

    def holds(self, version: str) -> bool:
        """Whether requests for this version can be answered here."""
        held = self.adapters.get(version)
        return self.ready and held is not None and held.state == "ready"


# -- what is stored -------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Version:
    """One content of an adapter. Times are Unix seconds; `loaded_at` is when it first was ready.

    `targets` are the replicas that shall hold it; `code` and `tensor` say what is wrong with one that failed.
    """

    number: int
    phase: Phase
    path: str
    created_at: float
    content_hash: str = ""
    kind: str = ""
    rank: int = 0
    nbytes: int = 0
    loaded_at: float | None = None
    reason: str = ""
    code: str | None = None
    tensor: str | None = None
    targets: tuple[str, ...] = ()


@dataclass(slots=True, frozen=True)
class Event:
    """Something that happened to an adapter. `at` is Unix seconds."""

    at: float
    phase: Phase
    reason: str
    version: int


@dataclass(slots=True, frozen=True)
class Record:
    """All that is stored of one name.

    current: number of the version that answers, None where none does. holders: the replicas that hold it, as requests
    are routed; empty while it is evicted or being loaded again. number: the last one given. origin: who registered it
    (`api`, `config`, `watch`). removed: it goes as soon as nothing uses it.
    """

    name: str
    base: str
    replicas: int | None = None
    pinned: bool = False
    origin: str = "api"
    number: int = 0
    current: int | None = None
    holders: tuple[str, ...] = ()
    evicted: bool = False
    removed: bool = False
    versions: tuple[Version, ...] = ()
    events: tuple[Event, ...] = ()

    def dumps(self) -> bytes:
        """As JSON."""
        return orjson.dumps(asdict(self))

    @staticmethod
    def loads(data: bytes) -> Record:
        """From JSON. Raises `ValueError` where it is not what `dumps` writes."""
        try:
            fields = orjson.loads(data)
            fields["holders"] = tuple(fields["holders"])
            fields["versions"] = tuple(Version(**{**v, "targets": tuple(v["targets"])}) for v in fields["versions"])
            fields["events"] = tuple(Event(**event) for event in fields["events"])
            return Record(**fields)
        except (TypeError, KeyError, AttributeError, orjson.JSONDecodeError) as error:
            raise ValueError(f"not an adapter's record: {error}") from None

    def version(self, number: int | None) -> Version | None:
        """The version of this number, where it is still known."""
        return next((v for v in self.versions if v.number == number), None)

    @property
    def serving(self) -> Version | None:
        """The version that requests get, or will get once it is loaded again."""
        return self.version(self.current)

    @property
    def staging(self) -> Version | None:
        """The version that is to become the current one."""
        return max(
            (v for v in self.versions if v.phase == "staged" and v.number != self.current),
            key=lambda v: v.number,
            default=None,
        )

    @property
    def shown(self) -> Version | None:
        """The version that the record's `phase` speaks of: the newest that was not overtaken by another."""
        standing = [v for v in self.versions if v.phase not in ("draining", "gone")]
        return max(standing or self.versions, key=lambda v: v.number, default=None)

    def with_version(self, version: Version) -> Record:
        """With this version put in the place of the one of the same number, or added."""
        others = [v for v in self.versions if v.number != version.number]
        versions = sorted([*others, version], key=lambda v: v.number)
        ended = [v for v in versions if v.phase in ENDED and v.number != self.current]
        surplus = {v.number for v in ended[: max(0, len(versions) - MAX_VERSIONS)]}
        kept = tuple(v for v in versions if v.number not in surplus)
        return replace(self, versions=kept, number=max(self.number, version.number))

    def without_version(self, number: int) -> Record:
        """With no trace of a version that nothing has ever loaded; its number is free again if it was the last."""
        last = self.number - 1 if number == self.number else self.number
        return replace(self, versions=tuple(v for v in self.versions if v.number != number), number=last)

    def with_event(self, at: float, phase: Phase, reason: str, version: int) -> Record:
        """With one more event, the oldest forgotten where there are too many."""
        return replace(self, events=(*self.events, Event(at, phase, reason[:400], version))[-MAX_EVENTS:])


@dataclass(slots=True, frozen=True)
class Numbers:
    """The last version numbers of names that are gone, so that an id never comes again for another content.

    `last` keeps the names that went last; every forgotten name had a number of `floor` at most.
    """

    floor: int = 0
    last: Mapping[str, int] = field(default_factory=dict)

    def of(self, name: str) -> int:
        """The last number that may have been given to this name."""
        return max(self.last.get(name, self.floor), 0)

    def with_name(self, name: str, number: int) -> Numbers:
        """With one more name that is gone."""
        last = {key: value for key, value in self.last.items() if key != name} | {name: number}
        floor = self.floor
        while len(last) > MAX_NUMBERS:
            floor = max(floor, last.pop(next(iter(last))))
        return Numbers(floor, last)

    def dumps(self) -> bytes:
        """As JSON."""
        return orjson.dumps([self.floor, list(self.last.items())])

    @staticmethod
    def loads(data: bytes) -> Numbers:
        """From JSON. Raises `ValueError` where it is not what `dumps` writes."""
        try:
            floor, last = orjson.loads(data)
            return Numbers(int(floor), {str(name): int(number) for name, number in last})
        except (TypeError, orjson.JSONDecodeError) as error:
            raise ValueError(f"not version numbers: {error}") from None


# -- what gateways go by --------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class ServedAdapter:
    """The current version of an adapter, as gateways route requests to it.

    version: its id (`banking@3`). holders: Serve's ids of the replicas that hold it; empty while it is evicted or being
    loaded again. loaded_at: Unix seconds.
    """

    name: str
    base: str
    version: str
    number: int
    kind: str
    content_hash: str
    rank: int
    nbytes: int
    pinned: bool
    holders: frozenset[str]
    evicted: bool
    loaded_at: float

    @property
    def id(self) -> str:
        """`base:name`, as `/v1/models` lists it."""
        return f"{self.base}:{self.name}"

    def dumps(self) -> bytes:
        """As JSON; equal content gives equal bytes."""
        return orjson.dumps(asdict(self) | {"holders": sorted(self.holders)})

    @staticmethod
    def loads(data: bytes) -> ServedAdapter:
        """From JSON. Raises `ValueError` where it is not what `dumps` writes."""
        try:
            fields = orjson.loads(data)
            return ServedAdapter(**{**fields, "holders": frozenset(fields["holders"])})
        except (TypeError, KeyError, orjson.JSONDecodeError) as error:
            raise ValueError(f"not a served adapter: {error}") from None


def served(record: Record) -> ServedAdapter | None:
    """What gateways are to know of a record; None where no version of it answers."""
    version = record.serving
    if version is None or record.removed:
        return None
    return ServedAdapter(
        name=record.name,
        base=record.base,
        version=version_id(record.name, version.number),
        number=version.number,
        kind=version.kind,
        content_hash=version.content_hash,
        rank=version.rank,
        nbytes=version.nbytes,
        pinned=record.pinned,
        holders=frozenset(record.holders),
        evicted=record.evicted,
        loaded_at=version.loaded_at or version.created_at,
    )


# -- what users are told --------------------------------------------------------------------------------------------


def describe(record: Record, reports: Sequence[ReplicaReport] | None) -> dict[str, Any]:
    """The record as `/v1/adapters` gives it, with what the base's replicas say at this moment.

    `reports` has one for each replica that answered, or is None where they could not be asked. `phase` is `ready` only
    where every replica that shall hold the version confirms it; `serving` is the number of the version
    that requests get.
    """
    version = record.shown
    number = version.number if version else 0
    phase, reason = _said(record, version, reports)
    return {
        "object": "adapter",
        "name": record.name,
        "base": record.base,
        "id": f"{record.base}:{record.name}",
        "phase": phase,
        "reason": reason,
        "code": version.code if version else None,
        "tensor": version.tensor if version else None,
        "version": number,
        "serving": None if record.removed else record.current,
        "content_hash": version.content_hash if version else "",
        "kind": version.kind if version else "",
        "rank": version.rank if version else 0,
        "bytes": version.nbytes if version else 0,
        "path": version.path if version else "",
        "pinned": record.pinned,
        "evicted": record.evicted,
        "origin": record.origin,
        "wanted_replicas": record.replicas,
        "replicas": _replicas(record, version, reports or ()),
        "versions": [_version(v) for v in reversed(record.versions)],
        "events": [asdict(event) for event in reversed(record.events)],
    }


def _said(record: Record, version: Version | None, reports: Sequence[ReplicaReport] | None) -> tuple[Phase, str]:
    """Phase and reason of the version in question; a stored `ready` stands only if the replicas confirm it."""
    if version is None:
        return "gone", ""
    if version.phase != "ready":
        return version.phase, version.reason
    if record.evicted:
        return "staged", "evicted: it is loaded again when it is asked for"
    if reports is None:
        return "staged", "it was ready, but its replicas cannot be asked at this moment"
    name = version_id(record.name, version.number)
    live = [report for report in reports if report.ready]
    wanted = live if record.replicas is None else [report for report in live if report.replica_id in version.targets]
    missing = [report.replica_id for report in wanted if not report.holds(name)]
    silent = set(version.targets) - {report.replica_id for report in reports}
    if not wanted:
        return "staged", f"no replica of '{record.base}' that shall hold it is alive"
    if missing:
        return "staged", f"not loaded (any more) on {', '.join(sorted(missing))}: being loaded again"
    if silent:
        return "staged", f"{', '.join(sorted(silent))} cannot be asked whether it still holds it"
    return "ready", version.reason


def _replicas(record: Record, version: Version | None, reports: Iterable[ReplicaReport]) -> dict[str, Any]:
    """Each replica of the base: which version of this adapter it holds, and in which phase."""
    said: dict[str, Any] = {}
    for report in reports:
        held = _held(record.name, report)
        newest = version.number if version and version.number in held else max(held, default=None)
        phase = _SHOWN[held[newest].state] if newest is not None else "absent"
        said[report.replica_id] = {
            "phase": phase if report.ready else "starting",
            "version": newest,
            "holds": {str(number): _SHOWN[h.state] for number, h in sorted(held.items())},
            "in_flight": sum(h.in_flight for h in held.values()),
        }
    for replica in version.targets if version and version.phase in ("staged", "ready") else ():
        said.setdefault(replica, {"phase": "unreachable", "version": None, "holds": {}, "in_flight": 0})
    return said


def _held(name: str, report: ReplicaReport) -> dict[int, Holding]:
    prefix = f"{name}@"
    return {split_id(v)[1]: h for v, h in report.adapters.items() if v.startswith(prefix)}


def _version(version: Version) -> dict[str, Any]:
    said = asdict(version)
    return {"version": said.pop("number"), "bytes": said.pop("nbytes"), **said, "targets": list(version.targets)}
