"""Every gateway's table of policies: read from memory, changed in the store, seen by all gateways within a second.

The configuration seeds it. What it says of a policy is written as a new version when that differs from what it said
last; so a change by API outlives a restart, until the file's own word changes. A policy that is taken out of the file
stays until it is deleted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import orjson
from pydantic import TypeAdapter, ValidationError

from signalbox.experts.base import ExpertUnavailable, InvalidRequest
from signalbox.policies.base import Policy
from signalbox.serving.config import Name
from signalbox.serving.policy_records import (
    KEPT_VERSIONS,
    MAX_BYTES,
    MAX_POLICIES,
    Kind,
    PolicyRecord,
    PolicyRecords,
    content,
    digest,
)
from signalbox.serving.store import Store, StoreUnavailable

__all__ = ["PolicyRecord", "PolicyTable", "check_name"]

log = logging.getLogger(__name__)

LOOK_S = 0.25  # between two looks at the generation
ATTEMPTS = 8  # to write where others write the same policy at the same time
RESERVED = frozenset({"validate"})  # a route stands there

_NAME: TypeAdapter[str] = TypeAdapter(Name)


class PolicyTable:
    """The policies as one gateway process sees them. All methods are for one event loop.

    `configured` serves until the store has answered. `protected` says of names that are in use who uses them: they
    cannot be deleted. With the store lost, what was read last serves, and writes raise `ExpertUnavailable` (503).
    """

    def __init__(self, store: Store, configured: Mapping[str, Policy], *, protected: Mapping[str, str]) -> None:
        self._records = PolicyRecords(store)
        self._configured = configured
        self._protected = protected
        self._hashes = {name: digest(policy) for name, policy in configured.items()}
        self._seeded = False
        self._generation = ""
        self._highest = 0
        self._raw: dict[str, bytes] = {}
        self._table = {
            name: PolicyRecord(name, 0, policy, 0.0, "configuration", f"0-{self._hashes[name]}")
            for name, policy in configured.items()
        }
        self._policies = dict(configured)
        self._reading = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Seed and read, then keep looking for changes until `close`. Where the store is lost, this comes later."""
        await self._look()
        self._task = asyncio.create_task(self._keep_looking(), name="policies")

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # -- for requests: memory alone ----------------------------------------------------------------------------

    @property
    def generation(self) -> str:
        """Of the table as last seen; it changes with every change of a policy."""
        return self._generation or "configuration"

    def get(self, name: str) -> PolicyRecord | None:
        """The version in force, as last seen."""
        return self._table.get(name)

    def names(self) -> list[str]:
        """All policies, as last seen, in alphabetical order."""
        return sorted(self._table)

    def policies(self) -> Mapping[str, Policy]:
        """All policies by name, as last seen. A new mapping after each change; not to be changed."""
        return self._policies

    # -- changes -----------------------------------------------------------------------------------------------

    async def put(
        self,
        name: str,
        policy: Policy,
        *,
        if_match: Collection[str] | None = None,
        if_none_match: bool = False,
        note: str = "API",
    ) -> tuple[PolicyRecord, bool]:
        """Put a policy in force; returns its record, and whether the name was new.

        A policy that says what is in force already changes nothing. `if_match` has the etags of which the current
        version must have one (`*`: any); `if_none_match` asks that there is none.

        Raises `InvalidRequest`: 400 for a name that is none, 409 where there are too many, 412 where a condition does
        not hold, 413 beyond 64 KiB; `ExpertUnavailable` where the store is lost.
        """
        return await self._change(name, policy, if_match, if_none_match, note, same=False)

    async def rollback(self, name: str, version: int, *, if_match: Collection[str] | None = None) -> PolicyRecord:
        """Put an old version in force again, as a new one; a policy that was deleted comes back.

        Raises as `put`, and `InvalidRequest` (404) where the version is not known (any more).
        """
        old = next((r for r in await self.versions(name) if r.version == version and not r.deleted), None)
        if old is None:
            raise InvalidRequest(
                f"policy '{name}' has no version {version} to go back to; the last {KEPT_VERSIONS} are kept, see "
                f"/v1/policies/{name}/versions",
                param="version",
                code="version_not_found",
                status=404,
            )
        record, _ = await self._change(name, old.policy, if_match, False, f"rollback to version {version}", same=True)
        return record

    async def delete(self, name: str, *, if_match: Collection[str] | None = None) -> None:
        """Take a policy out of force; its history stays.

        Raises `InvalidRequest`: 404 where there is none, 409 where it is in use, 412 where `if_match` does not hold;
        `ExpertUnavailable` where the store is lost.
        """
        if name in self._protected:
            raise InvalidRequest(
                f"policy '{name}' is in use ({self._protected[name]}): change the configuration first",
                code="policy_in_use",
                status=409,
            )
        for _ in range(ATTEMPTS):
            with _told():
                number, current = await self._current(name)
            if current is None and if_match is None:
                raise not_found(name)
            _check_conditions(name, current, if_match, False)
            assert current is not None
            record = PolicyRecord.of(name, number + 1, current.policy, "deleted", deleted=True)
            if await self._written(record, "delete"):
                return
        raise _contended(name)

    async def versions(self, name: str) -> list[PolicyRecord]:
        """The last 50 versions and deletions, newest first. Raises `InvalidRequest` (404) where there never was one."""
        with _told():
            found = await self._records.history(name)
        records = []
        for data in found:
            try:
                records.append(PolicyRecord.loads(data))
            except ValueError as error:
                log.warning("a version of policy %s is passed over: %s", name, error)
        if not records:
            raise not_found(name)
        return records

    async def _change(
        self, name: str, policy: Policy, if_match: Collection[str] | None, if_none_match: bool, note: str, *, same: bool
    ) -> tuple[PolicyRecord, bool]:
        """Write a version; `same`: also one that says what is in force already."""
        check_name(name)
        data = orjson.dumps(content(policy))
        if len(data) > MAX_BYTES:
            text = f"the policy is too large: {len(data)} bytes as JSON, of {MAX_BYTES} that may be"
            raise InvalidRequest(text, code="policy_too_large", status=413)
        for _ in range(ATTEMPTS):
            with _told():
                number, current = await self._current(name)
            _check_conditions(name, current, if_match, if_none_match)
            if current is not None and not same and orjson.dumps(content(current.policy)) == data:
                return current, False
            record = PolicyRecord.of(name, number + 1, policy, note)
            if await self._written(record):
                return record, current is None
        raise _contended(name)

    async def _current(self, name: str) -> tuple[int, PolicyRecord | None]:
        """The last number, and the record in force, as the store has them now."""
        number, data = await self._records.last(name)
        try:
            return number, PolicyRecord.loads(data) if data is not None else None
        except ValueError:
            text = f"policy '{name}' was written by another version of Signalbox, which alone can change it"
            raise InvalidRequest(text, code="policy_unreadable", status=409) from None

    async def _written(self, record: PolicyRecord, kind: Kind = "put") -> bool:
        """Write, then read what all see now. False where another was quicker, or the store had lost its data."""
        with _told():
            verdict = await self._records.write(record, kind)
            if verdict == "full":
                text = f"there are {MAX_POLICIES} policies, which is the most: delete one first"
                raise InvalidRequest(text, code="too_many_policies", status=409)
            if verdict == "lost":
                await self._restore()
            await self._read()
        return verdict == "ok"

    # -- reading and seeding -----------------------------------------------------------------------------------

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self._look()

    async def _look(self) -> None:
        try:
            if not self._seeded:
                await self._seed()
                self._seeded = True
            await self._read()
        except StoreUnavailable:
            pass  # the store logs its loss
        except Exception:
            log.exception("the policies cannot be read")

    async def _read(self) -> None:
        async with self._reading:  # or an older answer could overtake a newer one
            generation, highest, raw = await self._records.read(self._generation)
            if not generation:
                await self._restore()
                generation, highest, raw = await self._records.read(self._generation)
            if raw is None:
                return
            table = {}
            for name, data in sorted(raw.items()):
                record = self._parsed(name, data)
                if record is not None:
                    table[name] = record
            self._raw, self._table, self._highest = raw, table, highest
            self._policies = {name: record.policy for name, record in table.items()}
            self._generation = generation

    def _parsed(self, name: str, data: bytes) -> PolicyRecord | None:
        """A record of the table; what cannot be read (a newer version's) is passed over for what was known before."""
        known = self._table.get(name)
        if self._raw.get(name) == data:
            return known
        try:
            return PolicyRecord.loads(data)
        except ValueError as error:
            stays = f"version {known.version} goes on" if known is not None else "it is left out"
            log.error("the record of policy %s cannot be read (%s): %s", name, error, stays)
            return known

    async def _restore(self) -> None:
        """Fill a store that holds no policies, because it is new or has lost its data, with what this gateway has."""
        records = [
            record if record.version else PolicyRecord.of(record.name, 1, record.policy, record.note)
            for record in self._table.values()
        ]
        if self._generation:
            log.warning("the store has lost the policies: %d are written again, without their history", len(records))
        await self._records.restore(records, self._hashes, generation=self._generation, highest=self._highest)

    async def _seed(self) -> None:
        """Write what the configuration says now and did not say last time."""
        generation, _, _ = await self._records.read("")
        if not generation:
            await self._restore()
        said_last = await self._records.seeded()
        for name, policy in self._configured.items():
            if said_last.get(name) != self._hashes[name]:
                await self._seed_one(name, policy)

    async def _seed_one(self, name: str, policy: Policy) -> None:
        for _ in range(ATTEMPTS):
            try:
                number, current = await self._current(name)
            except InvalidRequest as error:
                log.error("the configuration's policy %s is not taken over: %s", name, error.message)
                return
            same = current is not None and digest(current.policy) == self._hashes[name]
            record = PolicyRecord.of(name, number + 1, policy, "configuration")
            verdict = await self._records.write(record, "mark" if same else "put", seed=self._hashes[name])
            if verdict == "full":
                log.error("the configuration's policy %s is not taken over: there are %d", name, MAX_POLICIES)
            if verdict == "lost":
                await self._restore()
            elif verdict != "stale":
                return


def check_name(name: str) -> str:
    """The name, if a policy may have it. Raises `InvalidRequest` (400)."""
    try:
        _NAME.validate_python(name)
    except ValidationError as error:
        said = str(error.errors()[0]["ctx"]["error"])
        raise InvalidRequest(f"a policy cannot be called '{name[:64]}': {said}", code="invalid_name") from None
    if name in RESERVED:
        raise InvalidRequest(f"a policy cannot be called '{name}': a route has this name", code="invalid_name")
    return name


def not_found(name: str) -> InvalidRequest:
    """The error of a name that no policy has."""
    return InvalidRequest(f"there is no policy '{name[:64]}'", code="policy_not_found", status=404)


def _check_conditions(
    name: str, current: PolicyRecord | None, if_match: Collection[str] | None, if_none_match: bool
) -> None:
    """Raises `InvalidRequest` (412) where the current version is not as the caller expects."""
    if if_none_match and current is not None:
        said = f"policy '{name}' exists (version {current.version})"
    elif if_match is None or (current is not None and (current.etag in if_match or "*" in if_match)):
        return
    elif current is None:
        said = f"there is no policy '{name}' that the condition could fit"
    else:
        said = f"policy '{name}' has changed: it is version {current.version} now, with ETag \"{current.etag}\""
    raise InvalidRequest(f"{said}; read it again", param="If-Match", code="precondition_failed", status=412)


def _contended(name: str) -> ExpertUnavailable:
    return ExpertUnavailable(f"policy '{name}' is being changed by others; try again", code="policy_contended")


@contextmanager
def _told() -> Iterator[None]:
    """A lost store as the client is told."""
    try:
        yield
    except StoreUnavailable as error:
        text = "policies cannot be changed or looked up in their history while the store is lost; try again in a moment"
        raise ExpertUnavailable(text, code="store_unavailable") from error
