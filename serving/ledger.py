"""Budgets, rates and in-flight limits: reserve what a request may cost at most, then settle what it did cost.

All verdicts are of scripts in the store (`ledger_scripts.py`), so any number of gateways decide as one. A reservation
is settled exactly once: repeated scripts change nothing, and what a dead gateway held is settled by the others, by
what it had noted as sent. Rates are GCRA, the generic cell rate algorithm (ITU-T I.371).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any

from signalbox.policies.charges import NOTHING, Account, Charge
from signalbox.serving import ledger_scripts as scripts
from signalbox.serving.ledger_accounts import (
    BudgetSpent,
    LedgerLost,
    RateLimited,
    TooManyInFlight,
    amounts,
    books,
    limits,
    refusal,
    usage,
)
from signalbox.serving.store import Store, StoreUnavailable

__all__ = ["Account", "BudgetSpent", "Charge", "Ledger", "LedgerLost", "RateLimited", "Reservation", "TooManyInFlight"]

log = logging.getLogger(__name__)

BEAT_S = 1.0
SILENCE_S = 5.0  # after which a gateway counts as dead
NOTE_S = 0.1  # between two notes of what has been sent
NOTES_AT_ONCE = 256
SWEEP_AT_ONCE = 128  # reservations, or books, in one script: nothing else runs in the store meanwhile
LOSS_S = 2.0  # how long the store must be out of reach before requests go uncounted
POLL_S = (0.05, 0.25)  # pauses of a request that waits for others' reservations, first and longest
MAX_WAITING = 256  # such requests in one gateway
MAX_UNSETTLED = 10_000  # charges that wait for the store's return, in one gateway


class Reservation:
    """What one request holds until it is settled or cancelled, whichever is first; later calls change nothing."""

    __slots__ = ("_accounts", "_booked", "_closed", "_ledger", "_most", "_sent", "id")

    def __init__(self, ledger: Ledger, id: str, accounts: Sequence[Account], most: Charge, *, booked: bool) -> None:
        self.id = id
        self._ledger = ledger
        self._accounts = accounts
        self._most = most
        self._booked = booked
        self._sent = NOTHING
        self._closed = not accounts

    @property
    def booked(self) -> bool:
        """Whether it stands in the books: not where nothing is limited, nor where the store was lost."""
        return self._booked

    def sent(self, charge: Charge) -> None:
        """Note what has been sent since the beginning: what is charged if this gateway dies.

        Costs a few attribute writes; the store is told in the background, every 0.1 s at most.
        """
        if not self._closed:
            self._sent = charge
            self._ledger._note(self)

    async def settle(self, actual: Charge) -> None:
        """Charge what the request cost and give back the rest of what was reserved.

        Never raises. Where the store is lost the charge is made when it is back. If the caller is cancelled
        meanwhile, settling goes on in the background.
        """
        if not self._closed:
            self._closed = True
            await self._ledger._finish(self, actual)

    async def cancel(self) -> None:
        """Nothing was sent: give everything back. Otherwise as `settle`."""
        await self.settle(NOTHING)


class Ledger:
    """The books, as one gateway sees them. `owner` names the gateway, by default by its process; a
    suffix makes it unique to this object.

    `uncounted` is the number of requests that were served while the store was lost (`on_store_loss: allow`),
    `forgotten` that of charges that were given up because too many waited for the store.
    """

    def __init__(self, store: Store, *, owner: str | None = None) -> None:
        self.owner = f"{owner or f'gateway-{os.getpid()}'}-{uuid.uuid4().hex[:12]}"
        self.uncounted = 0
        self.forgotten = 0
        self._store = store
        self._numbers = itertools.count(1)
        self._ours: set[str] = set()  # reservations that this gateway will settle
        self._noted: dict[str, Reservation] = {}  # sent something since the last note
        self._something_sent = asyncio.Event()
        self._unsettled: dict[str, tuple[Reservation, Charge]] = {}
        self._waiting = 0
        self._lost = False
        self._tasks: list[asyncio.Task[None]] = []
        self._finishing: set[asyncio.Task[None]] = set()

    # -- life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to give signs of life, to note what is sent and to sweep up after dead gateways."""
        self._tasks = [asyncio.create_task(self._beat_forever()), asyncio.create_task(self._note_forever())]

    async def close(self) -> None:
        """Make the charges that can be made, and stop. What stays open is settled by another gateway."""
        if self._finishing:
            await asyncio.wait(self._finishing, timeout=BEAT_S)
        for task in (*self._tasks, *self._finishing):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._finishing, return_exceptions=True)
        self._tasks = []
        with contextlib.suppress(StoreUnavailable):
            await self._publish_notes()
            await self._settle_late()

    # -- reserving ---------------------------------------------------------------------------------------------

    async def reserve(
        self, accounts: Sequence[Account], most: Charge, request_id: str, *, wait_s: float = 2.0
    ) -> Reservation:
        """Take what a request may cost at most from all accounts, or from none.

        Where it does not fit only because of what others hold, it waits up to `wait_s` seconds for them to come out
        cheaper. A request of more tokens than a rate's burst passes when nothing is owed, and those after it wait.
        Accounts without limits cost nothing. While the store is lost (two seconds after it was last reached), an
        account of `on_store_loss: deny` refuses; otherwise the request goes uncounted, and is charged at its end if
        the store is back by then, or later.

        Raises `BudgetSpent` (402), `RateLimited` or `TooManyInFlight` (429, with `retry_after_s`), or `LedgerLost`
        (503).
        """
        limited = list({(a.policy, a.holder): a for a in accounts if a.limited}.values())
        id = f"{next(self._numbers)}/{request_id[:64]}"
        if not limited:
            return Reservation(self, id, (), most, booked=False)
        self._ours.add(id)
        try:
            booked = await self._reserve(id, limited, most, wait_s)
        except asyncio.CancelledError:  # the script may have run, or be about to
            self._in_background(self._charge(id, NOTHING))
            self._ours.discard(id)
            raise
        except BaseException:
            self._ours.discard(id)
            raise
        return Reservation(self, id, limited, most, booked=booked)

    async def _reserve(self, id: str, accounts: Sequence[Account], most: Charge, wait_s: float) -> bool:
        clock = asyncio.get_running_loop().time
        deadline, pause = clock() + wait_s, POLL_S[0]
        failing_since: float | None = None
        waits = False
        try:
            while True:
                try:
                    obstacle = await self._take(id, accounts, most)
                except StoreUnavailable as error:
                    failing_since = failing_since or clock()
                    if self._lost or clock() - failing_since >= LOSS_S:
                        self._go_on_without(accounts, error)
                        return False
                    # A moment without a free connection must not let one request too many through.
                    await asyncio.sleep(POLL_S[1])
                    continue
                self._lost, failing_since = False, None
                if obstacle is None:
                    return True
                left = deadline - clock()
                if obstacle[0] != "held" or left <= 0 or not (waits or self._waiting < MAX_WAITING):
                    raise refusal(obstacle, accounts, most)
                if not waits:  # from now on also while it asks: a newcomer must not take its room
                    waits, self._waiting = True, self._waiting + 1
                await asyncio.sleep(min(left, pause * random.uniform(0.7, 1.3)))
                pause = min(pause * 1.5, POLL_S[1])
        finally:
            self._waiting -= waits

    async def _take(
        self, id: str, accounts: Sequence[Account], most: Charge, *, unasked: bool = False
    ) -> list[str] | None:
        """Reserve; returns what stands in the way, if anything. Raises `StoreUnavailable`."""
        keys = [f"ledger:held:{self.owner}", scripts.OWNERS, scripts.ENDS]
        arguments: list[str | int] = [id, self.owner, *amounts(most), int(unasked)]
        for account in accounts:
            keys += books(account)
            arguments += limits(account)
        answer = await self._store.script(scripts.RESERVE, keys, arguments)
        verdict = [part.decode() if isinstance(part, bytes) else str(part) for part in answer]
        return None if verdict[0] == "ok" else verdict

    def _go_on_without(self, accounts: Sequence[Account], error: StoreUnavailable) -> None:
        if not self._lost:
            self._lost = True
            log.warning("limits are not enforced where `on_store_loss` is `allow`: %s", error)
        for account in accounts:
            if account.limits.on_store_loss == "deny":
                raise LedgerLost(
                    f"the limits of policy '{account.policy}' cannot be checked at the moment: the store is lost",
                    retry_after_s=1.0,
                ) from error
        self.uncounted += 1

    # -- settling ----------------------------------------------------------------------------------------------

    async def _finish(self, reservation: Reservation, actual: Charge) -> None:
        self._noted.pop(reservation.id, None)
        self._unsettled[reservation.id] = (reservation, actual)
        if len(self._unsettled) > MAX_UNSETTLED:
            self._forget(next(iter(self._unsettled)))
        await asyncio.shield(self._in_background(self._settle_soon(reservation.id)))

    async def _settle_soon(self, id: str) -> None:
        with contextlib.suppress(StoreUnavailable):  # it is tried again with the next sign of life
            await self._settle_one(id)

    async def _settle_one(self, id: str) -> None:
        """Raises `StoreUnavailable`, and then it stays unsettled."""
        found = self._unsettled.pop(id, None)  # nobody else settles it meanwhile
        if found is None:
            return
        reservation, actual = found
        try:
            if not reservation._booked and actual != NOTHING:
                # In two steps that may each be repeated, and may each arrive late: one step could charge twice.
                await self._take(id, reservation._accounts, actual, unasked=True)
                reservation._booked = True
            await self._charge(id, actual)
        except (StoreUnavailable, asyncio.CancelledError):
            self._unsettled[id] = found
            raise
        except Exception:
            log.exception("the store's answer to settling reservation %s makes no sense", id)
            self.forgotten += 1
        self._ours.discard(id)

    async def _charge(self, id: str, actual: Charge) -> None:
        keys = [f"ledger:{kind}:{self.owner}" for kind in ("held", "sent", "swept")]
        await self._store.script(scripts.SETTLE, keys, [id, *amounts(actual)])

    def _forget(self, id: str) -> None:
        if self._unsettled.pop(id, None) is not None:
            self._ours.discard(id)
            self.forgotten += 1
            log.error("reservation %s is charged by what was noted as sent: it could not be settled", id)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._finishing.add(task)
        task.add_done_callback(self._background_done)
        return task

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._finishing.discard(task)
        if not task.cancelled():
            task.exception()  # only the store's loss, which it has logged itself

    # -- in the background -------------------------------------------------------------------------------------

    def _note(self, reservation: Reservation) -> None:
        self._noted[reservation.id] = reservation
        self._something_sent.set()

    async def _note_forever(self) -> None:
        while True:
            await self._something_sent.wait()
            try:
                await self._publish_notes()
            except StoreUnavailable:
                pass  # the next note says all that this one did
            except Exception:
                log.exception("what was sent could not be noted")
            await asyncio.sleep(NOTE_S)

    async def _publish_notes(self) -> None:
        self._something_sent.clear()
        noted, self._noted = list(self._noted.values()), {}
        keys = [f"ledger:held:{self.owner}", f"ledger:sent:{self.owner}"]
        try:
            while noted:
                arguments: list[str | int] = []
                for reservation in noted[:NOTES_AT_ONCE]:
                    arguments += [reservation.id, *amounts(reservation._sent)]
                await self._store.script(scripts.NOTE, keys, arguments)
                del noted[:NOTES_AT_ONCE]
        finally:
            for reservation in noted:  # not told: again, unless it is over
                if not reservation._closed:
                    self._note(reservation)

    async def _beat_forever(self) -> None:
        while True:
            try:
                await self._settle_late()
                await self._beat()
            except StoreUnavailable:
                pass  # it has been logged
            except Exception:
                log.exception("the ledger's books could not be swept")
            await asyncio.sleep(BEAT_S)

    async def _settle_late(self) -> None:
        """Make the charges that failed. Raises `StoreUnavailable`."""
        for id in list(self._unsettled):
            await self._settle_one(id)

    async def _beat(self) -> None:
        silence = round(SILENCE_S * 1e6)
        keys = [scripts.OWNERS, scripts.ENDS, f"ledger:held:{self.owner}"]
        silent, held = await self._store.script(scripts.BEAT, keys, [self.owner, silence, SWEEP_AT_ONCE])
        for owner in silent:
            await self._sweep(owner.decode(), silence)
        # A reservation whose script ran late, after its request had been refused or had ended, is nobody's.
        nobodys = [id.decode() for id in held if id.decode() not in self._ours]
        if nobodys:
            await self._sweep(self.owner, -1, nobodys[:SWEEP_AT_ONCE])

    async def _sweep(self, owner: str, silence_us: int, ids: Sequence[str] = ()) -> None:
        """Settle what `owner` holds by what it noted as sent: all of it, or these reservations."""
        keys = [f"ledger:{kind}:{owner}" for kind in ("held", "sent", "swept")]
        keys += [scripts.OWNERS, scripts.ENDS]
        while done := await self._store.script(scripts.SWEEP, keys, [owner, silence_us, SWEEP_AT_ONCE, *ids]):
            log.warning("%d reservations of %s were settled by what it had noted as sent", len(done), owner)

    # -- reading -----------------------------------------------------------------------------------------------

    async def usage(self, accounts: Sequence[Account]) -> list[dict[str, Any]]:
        """What stands in the books, for each account that has limits. Raises `StoreUnavailable`.

        Money in USD. `ends_at` is the end of the budget's window, ISO 8601; `wait_s` how long the next request, or
        the next token, has to wait for the rate.
        """
        limited = [account for account in accounts if account.limited]
        found = await asyncio.gather(*(self._store.script(scripts.READ, books(a), []) for a in limited))
        return [usage(account, *answer) for account, answer in zip(limited, found, strict=True)]
