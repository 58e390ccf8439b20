"""The ledger on a real Valkey: budgets that hold to the last request, rates, crashes, and the store gone."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from signalbox.experts.base import ExpertError
from signalbox.policies.base import Policy, Rate
from signalbox.policies.charges import Account, Charge
from signalbox.serving import ledger as ledger_module
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.ledger import BudgetSpent, Ledger, LedgerLost, RateLimited, Reservation, TooManyInFlight
from signalbox.serving.store import PREFIX, Store
from tests.ports import free_port
from tests.serving.ledger_clock import ClockedStore

NOON_US = 1_800_014_400_000_000  # a noon in UTC
NAMES = itertools.count()


def account(holder: str | None = None, *, name: str = "gold", **policy: Any) -> Account:
    """An account of its own, unless the holder is named."""
    return Account(name, holder or f"key:{next(NAMES)}", Policy.model_validate(policy))


def spent(said: dict[str, Any]) -> tuple[float, int, int]:
    return tuple(said["budget"][unit]["spent"] for unit in ("usd", "tokens", "requests"))  # type: ignore[return-value]


def reserved(said: dict[str, Any]) -> tuple[float, int, int]:
    return tuple(said["budget"][unit]["reserved"] for unit in ("usd", "tokens", "requests"))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with EmbeddedValkey() as url:
        yield url


@pytest.fixture
async def ledger(url: str) -> AsyncIterator[Ledger]:
    store = Store(url)
    ledger = Ledger(store)  # not started: its beats would settle beside a test
    yield ledger
    await ledger.close()
    await store.close()


@pytest.fixture
async def clock(url: str) -> AsyncIterator[ClockedStore]:
    """Begins and ends without books: what was done by one clock is not to be swept by another."""
    store = ClockedStore(url)
    with redis.Redis.from_url(url) as direct:
        direct.flushall()
        await store.set_clock(NOON_US)
        yield store
        direct.flushall()
    await store.close()


async def book(ledger: Ledger, account: Account) -> dict[str, Any]:
    return (await ledger.usage([account]))[0]


# -- budgets ---------------------------------------------------------------------------------------------------


async def test_reserve_settle_and_cancel(ledger: Ledger) -> None:
    gold = account(budget={"usd": 1, "tokens": 1000, "requests": 10, "window": "1d"})
    one = await ledger.reserve([gold], Charge(0.5, 400), "one")
    two = await ledger.reserve([gold], Charge(0.25, 100), "two")
    assert one.booked and two.booked
    said = await book(ledger, gold)
    assert reserved(said) == (0.75, 500, 2) and spent(said) == (0, 0, 0) and said["inflight"]["now"] == 2
    await one.settle(Charge(0.1, 40))
    await two.cancel()
    for _ in range(2):  # what is over stays over
        await one.settle(Charge(0.3, 300))
        await one.cancel()
        await two.settle(Charge(0.3, 300))
        one.sent(Charge(0.3, 300))
    said = await book(ledger, gold)
    assert reserved(said) == (0, 0, 0) and spent(said) == (0.1, 40, 1) and said["inflight"]["now"] == 0
    assert (said["policy"], said["holder"], said["budget"]["window_s"]) == ("gold", gold.holder, 86400)
    assert said["budget"]["ends_at"].endswith("T00:00:00Z") and said["budget"]["usd"]["limit"] == 1


@pytest.mark.parametrize(
    ("budget", "most"),
    [
        ({"requests": 10}, Charge(0.1, 7)),
        ({"usd": 10 * 0.1}, Charge(0.1, 7)),  # 0.1 ten times is not 1.0 in binary fractions
        ({"usd": 10 * 0.000_003}, Charge(0.000_003, 7)),
        ({"tokens": 70}, Charge(0.1, 7)),
    ],
)
async def test_a_budget_for_n_requests_lets_n_through(url: str, budget: dict[str, Any], most: Charge) -> None:
    """64 clients over two gateways; every third attempt fails and is given back, and its client comes again."""
    stores = [Store(url, timeout_s=10) for _ in range(2)]
    ledgers = [Ledger(store) for store in stores]
    gold, tenant = account(budget=budget), account(rate={"requests_per_minute": 1e6})
    numbers, charged = itertools.count(), 0

    async def client(ledger: Ledger) -> None:
        nonlocal charged
        while True:
            try:
                reservation = await ledger.reserve([tenant, gold], most, "x", wait_s=60)
            except BudgetSpent:
                return
            await asyncio.sleep(random.uniform(0, 0.02))
            if next(numbers) % 3 == 0:
                await reservation.cancel()
            else:
                charged += 1
                await reservation.settle(most)

    await asyncio.gather(*(client(ledgers[i % 2]) for i in range(64)))
    assert charged == 10
    said = await book(ledgers[0], gold)
    assert spent(said) == (pytest.approx(10 * most.usd, rel=1e-12), 70, 10) and reserved(said) == (0, 0, 0)
    for store in stores:
        await store.close()


async def test_what_others_hold_is_waited_for_and_what_is_spent_is_not(ledger: Ledger) -> None:
    gold = account(budget={"tokens": 100})
    holds = await ledger.reserve([gold], Charge(0, 80), "holds")
    waiting = asyncio.create_task(ledger.reserve([gold], Charge(0, 60), "waits", wait_s=30))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    await holds.settle(Charge(0, 40))
    await (await waiting).settle(Charge(0, 60))
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(BudgetSpent) as caught:
        await ledger.reserve([gold], Charge(0, 1), "late", wait_s=60)
    assert loop.time() - began < 30
    error = caught.value
    assert (error.status, error.code, error.retryable, error.retry_after_s) == (402, "budget_spent", False, None)
    whom = f"policy 'gold' of {gold.holder.replace(':', ' ')}"
    assert error.message.startswith(f"the budget of {whom} is 100 tokens until 2")
    assert error.message.endswith("100 tokens are spent, and this request may need 1 tokens")


async def test_waiting_ends(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    gold = account(budget={"usd": 1})
    holds = await ledger.reserve([gold], Charge(0.75), "holds")
    with pytest.raises(BudgetSpent, match=r"0 USD are spent and 0.75 USD are held by requests in flight"):
        await ledger.reserve([gold], Charge(0.5), "waits", wait_s=0.1)
    monkeypatch.setattr(ledger_module, "MAX_WAITING", 1)
    waiting = asyncio.create_task(ledger.reserve([gold], Charge(0.5), "waits", wait_s=30))
    while not ledger._waiting:
        assert not waiting.done()
        await asyncio.sleep(0.01)
    with pytest.raises(BudgetSpent):  # no room to wait
        await ledger.reserve([gold], Charge(0.5), "another", wait_s=30)
    await holds.cancel()
    await (await waiting).cancel()


async def test_all_accounts_or_none(ledger: Ledger) -> None:
    tenant = account("tenant:all", budget={"requests": 5})
    key = account("key:all", budget={"requests": 1})
    free = account("key:all", name="free")
    first = await ledger.reserve([tenant, free, key, key], Charge(), "first")
    with pytest.raises(BudgetSpent, match="of key all"):
        await ledger.reserve([tenant, free, key], Charge(), "second", wait_s=0)
    assert [reserved(said)[2] for said in await ledger.usage([tenant, free, key])] == [1, 1]
    await first.settle(Charge())
    assert [spent(said)[2] for said in await ledger.usage([tenant, free, key])] == [1, 1]


async def test_without_limits_the_store_is_not_asked() -> None:
    store = Store("redis://127.0.0.1:1/0")
    ledger = Ledger(store)
    for accounts in ([], [account(objective={"cost": 1})]):
        reservation = await ledger.reserve(accounts, Charge(1, 1), "free")
        reservation.sent(Charge(1, 1))
        await reservation.settle(Charge(1, 1))
        assert not reservation.booked
    assert store.available and ledger.uncounted == 0
    await store.close()


async def test_a_reservation_is_charged_to_the_window_it_was_made_in(clock: ClockedStore) -> None:
    ledger = Ledger(clock)
    gold = account(budget={"tokens": 100, "window": "1h"})
    old = await ledger.reserve([gold], Charge(0, 60), "old")
    await clock.set_clock(NOON_US + 3_600_000_000)
    new = await ledger.reserve([gold], Charge(0, 100), "new")
    await old.settle(Charge(0, 60))
    said = await book(ledger, gold)
    assert reserved(said)[1] == 100 and spent(said)[1] == 0
    await new.settle(Charge(0, 90))
    await clock.set_clock(NOON_US + 3_599_000_000)  # a clock that is set back opens no window anew
    with pytest.raises(BudgetSpent, match="90 tokens are spent"):
        await ledger.reserve([gold], Charge(0, 20), "again", wait_s=0)


async def test_another_window_has_books_of_its_own(ledger: Ledger) -> None:
    """Two gateways may for a moment have two versions of a policy: neither wipes the other's books."""
    day, hour = account("key:w", budget={"requests": 1}), account("key:w", budget={"requests": 1, "window": "1h"})
    for policy in (day, hour):
        await (await ledger.reserve([policy], Charge(), "x")).settle(Charge())
    for policy in (day, hour):
        with pytest.raises(BudgetSpent):
            await ledger.reserve([policy], Charge(), "x")


async def test_more_than_was_reserved_is_charged(ledger: Ledger) -> None:
    gold = account(budget={"tokens": 100})
    await (await ledger.reserve([gold], Charge(0, 90), "x")).settle(Charge(0, 120))
    assert spent(await book(ledger, gold))[1] == 120


# -- rates and requests in flight ------------------------------------------------------------------------------


async def test_a_rate_lets_its_burst_through_and_then_its_pace(clock: ClockedStore) -> None:
    ledger = Ledger(clock)
    gold = account(rate={"requests_per_minute": 60, "burst": 5})
    for _ in range(5):
        await (await ledger.reserve([gold], Charge(), "x")).settle(Charge())
    with pytest.raises(RateLimited) as caught:
        await ledger.reserve([gold], Charge(), "x")
    error = caught.value
    assert (error.status, error.code, error.retry_after_s) == (429, "rate_limited", 1.0)
    assert error.message.endswith("allows 60 requests a minute; come again in 1 s")
    assert (await book(ledger, gold))["rate"]["requests"] == {"per_minute": 60, "wait_s": 1.0}
    await clock.set_clock(NOON_US + 999_999)
    with pytest.raises(RateLimited):
        await ledger.reserve([gold], Charge(), "x")
    await clock.set_clock(NOON_US + 1_000_000)
    taken = await ledger.reserve([gold], Charge(), "x")
    with pytest.raises(RateLimited):
        await ledger.reserve([gold], Charge(), "x")
    await taken.cancel()  # nothing was sent: the next one may have its turn
    await (await ledger.reserve([gold], Charge(), "x")).settle(Charge())


async def test_a_rate_slower_than_its_burst_lets_one_through(clock: ClockedStore) -> None:
    ledger = Ledger(clock)
    gold = account(rate={"requests_per_minute": 0.5, "burst": 1})
    await ledger.reserve([gold], Charge(), "x")
    with pytest.raises(RateLimited) as caught:
        await ledger.reserve([gold], Charge(), "x")
    assert caught.value.retry_after_s == 120


async def test_tokens_that_were_not_needed_are_given_back(clock: ClockedStore) -> None:
    ledger = Ledger(clock)
    gold = account(rate={"tokens_per_minute": 6000, "burst": 10})  # 100 a second, 1000 at once
    one = await ledger.reserve([gold], Charge(0, 1000), "one")
    with pytest.raises(RateLimited) as caught:
        await ledger.reserve([gold], Charge(0, 300), "two")
    assert caught.value.retry_after_s == 3.0
    await one.settle(Charge(0, 200))
    two = await ledger.reserve([gold], Charge(0, 800), "two")
    with pytest.raises(RateLimited):
        await ledger.reserve([gold], Charge(0, 1), "three")
    await clock.set_clock(NOON_US + 60_000_000)  # time has paid off what `two` took: it gives nothing back
    await ledger.reserve([gold], Charge(0, 1000), "three")
    await two.cancel()
    with pytest.raises(RateLimited) as caught:
        await ledger.reserve([gold], Charge(0, 100), "four")
    assert caught.value.retry_after_s == 1.0


async def test_a_request_larger_than_the_burst_passes_when_nothing_is_owed(clock: ClockedStore) -> None:
    ledger = Ledger(clock)
    gold = account(rate={"tokens_per_minute": 6000, "burst": 1})
    large = await ledger.reserve([gold], Charge(0, 5000), "large")
    with pytest.raises(RateLimited) as caught:
        await ledger.reserve([gold], Charge(0, 100), "small")
    assert caught.value.retry_after_s == 50.0
    await large.settle(Charge(0, 100))
    with pytest.raises(RateLimited) as caught:  # something is owed: the large one waits until it is not
        await ledger.reserve([gold], Charge(0, 5000), "large")
    assert caught.value.retry_after_s == 1.0


async def test_requests_in_flight(ledger: Ledger) -> None:
    gold = account(slo={"max_inflight": 2})
    held = [await ledger.reserve([gold], Charge(), "x") for _ in range(2)]
    with pytest.raises(TooManyInFlight) as caught:
        await ledger.reserve([gold], Charge(), "x", wait_s=30)
    error = caught.value
    assert (error.status, error.code, error.retry_after_s) == (429, "max_inflight", 1.0)
    assert error.message.endswith("allows 2 requests in flight, and they are")
    await held[0].settle(Charge())
    await (await ledger.reserve([gold], Charge(), "x")).cancel()


async def test_a_spent_budget_is_said_before_a_rate(ledger: Ledger) -> None:
    """A client told to come again in a second would come in vain all day."""
    gold = account(budget={"requests": 1}, rate={"requests_per_minute": 1, "burst": 1}, slo={"max_inflight": 1})
    await (await ledger.reserve([gold], Charge(), "x")).settle(Charge())
    with pytest.raises(BudgetSpent):
        await ledger.reserve([gold], Charge(), "x")


# -- crashes ---------------------------------------------------------------------------------------------------


async def test_what_a_dead_gateway_held_is_settled_by_what_it_had_sent(url: str, clock: ClockedStore) -> None:
    dead, living = Ledger(clock, owner="one"), Ledger(clock)
    gold = account(budget={"usd": 1, "tokens": 1000, "requests": 10}, slo={"max_inflight": 10})
    streams = [await dead.reserve([gold], Charge(0.1, 100), "x") for _ in range(3)]
    streams[0].sent(Charge(0.01, 10))
    streams[0].sent(Charge(0.02, 20))
    streams[1].sent(Charge(0.05, 50))
    await dead._publish_notes()
    streams[1].sent(Charge(0.06, 60))  # it dies before it can note this
    await living._beat()
    assert reserved(await book(living, gold)) == (pytest.approx(0.3), 300, 3)
    await clock.set_clock(NOON_US + 4_999_999)
    await living._beat()
    assert reserved(await book(living, gold))[2] == 3
    await clock.set_clock(NOON_US + 5_000_000)
    await living._beat()
    said = await book(living, gold)
    assert reserved(said) == (0, 0, 0) and spent(said) == (0.07, 70, 2) and said["inflight"]["now"] == 0
    with redis.Redis.from_url(url) as direct:
        assert direct.zrange(f"{PREFIX}ledger:owners", 0, -1) == [living.owner.encode()]
        assert not direct.exists(f"{PREFIX}ledger:sent:{dead.owner}")


async def test_a_gateway_that_was_only_slow_charges_the_difference(clock: ClockedStore) -> None:
    slow, other = Ledger(clock), Ledger(clock)
    gold = account(budget={"tokens": 1000}, slo={"max_inflight": 10})
    stream, silent = [await slow.reserve([gold], Charge(0, 100), "x") for _ in range(2)]
    stream.sent(Charge(0, 30))
    await slow._publish_notes()
    await clock.set_clock(NOON_US + 6_000_000)
    await other._beat()
    assert spent(await book(other, gold))[1:] == (30, 1)
    await slow._beat()
    stream.sent(Charge(0, 60))
    await slow._publish_notes()
    for _ in range(2):
        await stream.settle(Charge(0, 80))
        await silent.settle(Charge(0, 5))
    said = await book(other, gold)
    assert spent(said)[1:] == (85, 2) and reserved(said) == (0, 0, 0) and said["inflight"]["now"] == 0


async def test_many_reservations_are_swept(clock: ClockedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "SWEEP_AT_ONCE", 8)
    dead, living = Ledger(clock), Ledger(clock)
    gold = account(budget={"requests": 100})
    for reservation in [await dead.reserve([gold], Charge(0, 1), "x") for _ in range(50)]:
        reservation.sent(Charge(0, 1))
    await dead._publish_notes()
    await clock.set_clock(NOON_US + 6_000_000)
    await living._beat()
    assert spent(await book(living, gold))[1:] == (50, 50)


async def test_a_reservation_that_arrives_late_is_given_back(clock: ClockedStore) -> None:
    """A store that stood still runs a script after its caller has gone: nobody would ever settle it."""
    ledger = Ledger(clock)
    gold = account(budget={"requests": 10})
    before = await ledger.reserve([gold], Charge(), "x")
    await ledger._take("999/late", [gold], Charge())
    assert reserved(await book(ledger, gold))[2] == 2
    await ledger._beat()
    assert reserved(await book(ledger, gold))[2] == 1, "the other one is in use"
    await before.settle(Charge())
    await ledger._take(before.id, [gold], Charge())  # the first copy of a script that was sent twice
    await ledger._beat()
    said = await book(ledger, gold)
    assert reserved(said)[2] == 0 and spent(said)[2] == 1


async def test_a_client_that_goes_while_it_reserves_leaves_nothing(url: str) -> None:
    store = Store(url, timeout_s=10)
    ledger = Ledger(store)
    gold = account(budget={"requests": 1000}, slo={"max_inflight": 1000})
    tasks = [asyncio.create_task(ledger.reserve([gold], Charge(), "x")) for _ in range(200)]
    for i in range(len(tasks)):
        await asyncio.sleep(0)
        if i >= 20:
            tasks[i - 20].cancel()
    for task in tasks:
        task.cancel()
    made = await asyncio.gather(*tasks, return_exceptions=True)
    for reservation in made:
        if isinstance(reservation, Reservation):
            await reservation.cancel()
    await asyncio.gather(*ledger._finishing)
    await ledger._beat()
    said = await book(ledger, gold)
    assert reserved(said) == (0, 0, 0) and spent(said) == (0, 0, 0) and said["inflight"]["now"] == 0
    assert any(isinstance(found, asyncio.CancelledError) for found in made)
    await store.close()


async def test_settling_goes_on_when_its_caller_is_cancelled(url: str) -> None:
    store = Store(url, timeout_s=10)
    ledger = Ledger(store)
    gold = account(budget={"requests": 1000})
    for i in range(50):
        reservation = await ledger.reserve([gold], Charge(), "x")
        task = asyncio.create_task(reservation.settle(Charge()))
        for _ in range(i % 10):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if not reservation._closed:  # cancelled before it had begun
            await reservation.settle(Charge())
    await ledger.close()
    said = await book(ledger, gold)
    assert spent(said)[2] == 50 and reserved(said)[2] == 0
    await store.close()


async def test_what_is_sent_is_noted_in_the_background(url: str, ledger: Ledger) -> None:
    await ledger.start()
    gold = account(budget={"tokens": 100})
    reservation = await ledger.reserve([gold], Charge(0, 10), "x")
    reservation.sent(Charge(0, 3))
    reservation.sent(Charge(0, 4))
    with redis.Redis.from_url(url) as direct:
        for _ in range(500):
            if noted := direct.hgetall(f"{PREFIX}ledger:sent:{ledger.owner}"):
                break
            await asyncio.sleep(0.01)
        assert list(noted) == [reservation.id.encode()]
        await reservation.settle(Charge(0, 5))
        async with asyncio.timeout(60):  # a beat may be the one that settles it
            while direct.exists(f"{PREFIX}ledger:sent:{ledger.owner}"):
                await asyncio.sleep(0.01)
    assert spent(await book(ledger, gold))[1] == 5


# -- the store gone --------------------------------------------------------------------------------------------


async def test_without_the_store_the_policy_says_whether_to_serve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    valkey = EmbeddedValkey(port=port, data_dir=tmp_path)
    store = Store(valkey.start(), retry_after_s=0.05)
    ledger = Ledger(store)
    allow = account(budget={"tokens": 100, "requests": 10})
    deny = account(budget={"tokens": 100}, on_store_loss="deny")
    booked = await ledger.reserve([allow], Charge(0, 10), "before")
    valkey.stop()
    with caplog.at_level(logging.WARNING, logger="signalbox.serving.ledger"):
        uncounted = [await ledger.reserve([allow], Charge(0, 20), "during") for _ in range(3)]
        with pytest.raises(LedgerLost) as caught:
            await ledger.reserve([allow, deny], Charge(0, 20), "denied")
    error = caught.value
    assert (error.status, error.code, error.retry_after_s) == (503, "store_lost", 1.0)
    assert not any(reservation.booked for reservation in uncounted) and ledger.uncounted == 3
    assert len([r for r in caplog.records if "not enforced" in r.message]) == 1
    uncounted[0].sent(Charge(0, 2))
    await booked.settle(Charge(0, 7))
    await uncounted[0].settle(Charge(0, 5))
    await uncounted[1].cancel()
    with EmbeddedValkey(port=port, data_dir=tmp_path):
        await asyncio.sleep(0.1)
        assert spent(await book(ledger, allow))[1:] == (0, 0)
        await uncounted[2].settle(Charge(0, 11))  # the store is back while it runs
        await ledger._settle_late()
        said = await book(ledger, allow)
        assert spent(said)[1:] == (23, 3) and reserved(said) == (0, 0, 0) and said["inflight"]["now"] == 0
        assert not ledger._ours and not ledger._unsettled
        await ledger.close()
        await store.close()


async def test_a_store_that_stands_still_neither_loses_nor_doubles_a_charge() -> None:
    """It runs, when it goes on, every script that was sent to it meanwhile, given up or not."""
    valkey = EmbeddedValkey()
    store = Store(valkey.start(), timeout_s=0.2, retry_after_s=0.1)
    ledger = Ledger(store)
    await ledger.start()
    gold = account(budget={"tokens": 1000, "requests": 100}, slo={"max_inflight": 50})
    running = [await ledger.reserve([gold], Charge(0, 10), "before") for _ in range(5)]
    assert valkey.pid is not None
    os.kill(valkey.pid, signal.SIGSTOP)
    try:
        for reservation in running:
            reservation.sent(Charge(0, 1))
        during = await asyncio.gather(*(ledger.reserve([gold], Charge(0, 10), "during") for _ in range(5)))
        await asyncio.gather(*(reservation.settle(Charge(0, 3)) for reservation in (*running[:3], *during[:3])))
        await during[3].cancel()
        await asyncio.sleep(2)
    finally:
        os.kill(valkey.pid, signal.SIGCONT)
    for _ in range(600):
        await asyncio.sleep(0.05)
        if store.available and not ledger._unsettled:
            break
    await asyncio.gather(*(reservation.settle(Charge(0, 4)) for reservation in (*running[3:], *during[4:])))
    for _ in range(600):  # until what a beat of its own has begun to settle is settled
        await ledger._beat()
        said = await book(ledger, gold)
        if reserved(said) == (0, 0, 0) and spent(said)[2] == 9:
            break
        await asyncio.sleep(0.05)
    assert spent(said)[1:] == (6 * 3 + 3 * 4, 9) and reserved(said) == (0, 0, 0)
    assert said["inflight"]["now"] == 0
    await ledger.close()
    await store.close()
    valkey.stop()


async def test_a_moment_without_the_store_lets_nothing_through_uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "LOSS_S", 60.0)
    port = free_port()
    store = Store(f"redis://127.0.0.1:{port}/0", retry_after_s=0.05)
    ledger = Ledger(store)
    gold, deny = account(budget={"requests": 1}), account(budget={"requests": 1}, on_store_loss="deny")
    waiting = [asyncio.create_task(ledger.reserve([policy], Charge(), "x", wait_s=0)) for policy in (gold, gold, deny)]
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in waiting) and not store.available
    with EmbeddedValkey(port=port):
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert sum(isinstance(one, Reservation) and one.booked for one in found) == 2 and ledger.uncounted == 0
        assert sum(isinstance(one, BudgetSpent) for one in found) == 1
        await store.close()


async def test_charges_that_wait_for_the_store_are_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_UNSETTLED", 5)
    store = Store("redis://127.0.0.1:1/0")
    ledger = Ledger(store)
    gold = account(budget={"tokens": 100})
    for _ in range(8):
        await (await ledger.reserve([gold], Charge(0, 1), "x")).settle(Charge(0, 1))
    assert len(ledger._unsettled) == 5 and ledger.forgotten == 3 and len(ledger._ours) == 5
    assert "could not be settled" in caplog.text
    await ledger.close()
    await store.close()


async def test_books_that_make_no_sense_end_no_request(
    url: str, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    gold = account(budget={"tokens": 100})
    reservation = await ledger.reserve([gold], Charge(0, 1), "x")
    with redis.Redis.from_url(url) as direct:
        direct.set(f"{PREFIX}ledger:held:{ledger.owner}", "someone else's")
        await reservation.settle(Charge(0, 1))
        direct.delete(f"{PREFIX}ledger:held:{ledger.owner}")
    assert ledger.forgotten == 1 and not ledger._ours and "makes no sense" in caplog.text


# -- the books themselves --------------------------------------------------------------------------------------


async def test_books_end(url: str, clock: ClockedStore) -> None:
    ledger = Ledger(clock)
    gold = account(budget={"requests": 10, "window": "1h"}, rate={"requests_per_minute": 60})
    open_one = await ledger.reserve([gold], Charge(), "x")
    await (await ledger.reserve([gold], Charge(), "x")).settle(Charge())
    dead = Ledger(clock)
    await dead.reserve([gold], Charge(), "x")
    with redis.Redis.from_url(url) as direct:

        def books() -> set[str]:
            keys = {key.decode().removeprefix(f"{PREFIX}ledger:").split(":")[0] for key in direct.keys("*ledger*")}
            return keys - {"owners", "ends"}

        assert books() == {"budget", "flow", "held"}
        # Nothing has a time to live: that is what the embedded Valkey evicts when the cache fills its memory.
        assert all(direct.ttl(key) == -1 for key in direct.keys("*ledger*"))
        await clock.set_clock(NOON_US + 3_600_000_000)
        await ledger._beat()
        assert books() == {"flow", "held", "swept"}, "the window is over"
        await open_one.settle(Charge())
        await clock.set_clock(NOON_US + 3 * 3_600_000_000)
        await ledger._beat()
        assert books() == set()
        assert direct.zcard(f"{PREFIX}ledger:ends") == 0


async def test_a_full_cache_takes_no_budget_with_it() -> None:
    with EmbeddedValkey(max_memory_mib=16) as url:
        store = Store(url)
        ledger = Ledger(store)
        gold = account(budget={"requests": 1})
        await (await ledger.reserve([gold], Charge(), "x")).settle(Charge())
        for i in range(64):
            await store.set(f"cache{i}", bytes(1 << 20), ttl_s=3600)
        assert await store.get("cache0") is None
        with pytest.raises(BudgetSpent):
            await ledger.reserve([gold], Charge(), "x")
        await store.close()


async def test_amounts_of_many_digits_are_exact(ledger: Ledger) -> None:
    gold = account(budget={"usd": 5_000_000, "tokens": 10**15})
    for _ in range(3):
        await (await ledger.reserve([gold], Charge(1_234_567.123456789, 10**14 + 7), "x")).settle(
            Charge(1_234_567.123456789, 10**14 + 7)
        )
    said = await book(ledger, gold)
    assert spent(said) == (3_703_701.370370367, 3 * (10**14 + 7), 3)


@pytest.mark.parametrize("kind", [BudgetSpent, RateLimited, TooManyInFlight, LedgerLost])
def test_another_expert_is_not_tried(kind: type[ExpertError]) -> None:
    assert not kind("x").retryable


async def test_a_new_rate_takes_over_what_is_owed_in_requests(ledger: Ledger) -> None:
    """Who owes a request at one a hundred minutes owes it at ten a second too, and not for a hundred minutes."""
    slow = Account("gold", "key:a", Policy(rate=Rate(requests_per_minute=0.01, burst=1)))
    fast = Account("gold", "key:a", Policy(rate=Rate(requests_per_minute=600, burst=1)))
    await (await ledger.reserve([slow], Charge(), "r1")).settle(Charge())
    with pytest.raises(RateLimited):
        await ledger.reserve([slow], Charge(), "r2")
    await (await ledger.reserve([fast], Charge(), "r3")).settle(Charge())
    assert (await ledger.usage([fast]))[0]["rate"]["requests"]["per_minute"] == 600
