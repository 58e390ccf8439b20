"""The ledger against a model of a few lines: whatever happens in whatever order, charges are conserved.

Two gateways, two accounts, and the real scripts in a real Valkey; only the clock is ours. The model keeps a list of
what happened and adds it up, where the ledger keeps sums.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from signalbox.policies.base import Policy
from signalbox.policies.charges import Account, Charge
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.ledger import BudgetSpent, Ledger, RateLimited, Reservation, TooManyInFlight
from tests.serving.ledger_clock import ClockedStore

T = TypeVar("T")

START_US = 1_800_000_000_000_000
WINDOW_US = 20_000_000
SILENCE_US = 5_000_000
ACCOUNTS = [
    Account(
        "gold",
        "tenant:acme",
        Policy.model_validate(
            {
                "budget": {"usd": 0.00001, "tokens": 1000, "requests": 12, "window": 20},
                "rate": {"requests_per_minute": 120, "tokens_per_minute": 6000, "burst": 3},
            }
        ),
    ),
    Account(
        "silver",
        "key:ci",
        Policy.model_validate({"budget": {"tokens": 600, "window": 20}, "slo": {"max_inflight": 3}}),
    ),
]


@dataclass
class Request:
    """One reservation as the model sees it. Amounts are (nano-USD, tokens, requests)."""

    owner: int
    accounts: list[int]
    most: tuple[int, int, int]
    made_us: int
    real: Reservation
    ends_us: dict[tuple[int, int], int] = field(default_factory=dict)  # (account, unit) -> when the rate is paid off
    charged: tuple[int, int, int] | None = None  # None: open
    said: tuple[int, int, int] = (0, 0, 0)  # sent so far, as its gateway knows
    noted: tuple[int, int, int] = (0, 0, 0)  # as the store knows
    settled: bool = False  # by its gateway


def usd(nano: int) -> float:
    return nano / 1e9


def charge(amounts: tuple[int, int, int]) -> Charge:
    return Charge(usd(amounts[0]), amounts[1], amounts[2])


class Books(RuleBasedStateMachine):
    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.valkey = VALKEY
        self.store = ClockedStore(self.valkey)
        self.now = START_US
        self.run(self.store._redis.flushall())
        self.run(self.store.set_clock(self.now))
        self.made: list[Request] = []
        self.arrival: dict[tuple[int, int], int] = {}  # (account, unit) -> GCRA's theoretical arrival time
        self.ledgers: list[Ledger] = []
        self.heard: dict[int, int] = {}  # gateway -> when it was last heard of
        self.alive: list[int] = []
        for _ in range(2):
            self.new_gateway()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def new_gateway(self) -> int:
        async def make() -> Ledger:
            return Ledger(self.store)

        self.ledgers.append(self.run(make()))
        self.alive.append(len(self.ledgers) - 1)
        return self.alive[-1]

    def teardown(self) -> None:
        self.run(self.store.close())
        self.runner.close()

    # -- the model ---------------------------------------------------------------------------------------------

    def books(self, account: int) -> tuple[list[int], list[int], int]:
        """Spent and held in the present window, and requests in flight."""
        spent, held, inflight = [0, 0, 0], [0, 0, 0], 0
        for request in self.made:
            if account not in request.accounts:
                continue
            inflight += request.charged is None
            if request.made_us // WINDOW_US == self.now // WINDOW_US:
                book = held if request.charged is None else spent
                for unit, amount in enumerate(request.most if request.charged is None else request.charged):
                    book[unit] += amount
        return spent, held, inflight

    def verdict(self, accounts: list[int], most: tuple[int, int, int]) -> str:
        found = {"ok"}
        for account in accounts:
            limits = ACCOUNTS[account].limits
            spent, held, inflight = self.books(account)
            assert limits.budget is not None
            usd_limit = None if limits.budget.usd is None else round(limits.budget.usd * 1e9)
            for unit, limit in enumerate((usd_limit, limits.budget.tokens, limits.budget.requests)):
                if limit is not None and spent[unit] + held[unit] + most[unit] > limit:
                    found.add("budget")
            for unit, per, burst in self.rates(account):
                cost = per * most[unit]
                # What costs nothing of a unit owes nothing in it.
                if cost and max(self.arrival.get((account, unit), 0), self.now) + cost - self.now > max(burst, cost):
                    found.add("rate")
            if limits.slo.max_inflight is not None and inflight >= limits.slo.max_inflight:
                found.add("inflight")
        if "budget" in found and found & {"rate", "inflight"}:
            return "any"  # which is graver depends on whether what is held would make room
        return next(v for v in ("rate", "inflight", "budget", "ok") if v in found)

    @staticmethod
    def rates(account: int) -> list[tuple[int, int, int]]:
        """(unit, µs for one, burst in µs)."""
        rate = ACCOUNTS[account].limits.rate
        if rate is None:
            return []
        assert rate.requests_per_minute and rate.tokens_per_minute
        burst = round(rate.burst * 1e6)
        return [(2, round(60e6 / rate.requests_per_minute), burst), (1, round(60e6 / rate.tokens_per_minute), burst)]

    def close(self, request: Request, actual: tuple[int, int, int]) -> None:
        before, again = request.charged or request.most, request.charged is not None
        for account in request.accounts:
            for unit, per, _ in self.rates(account):
                unused = (before[unit] - actual[unit]) * per
                arrival = self.arrival[account, unit]
                if unused > 0 and not again:
                    self.arrival[account, unit] = arrival - min(
                        unused, max(0, request.ends_us.get((account, unit), 0) - self.now)
                    )
                elif unused < 0:
                    self.arrival[account, unit] = max(arrival, self.now) - unused
        request.charged = actual

    # -- what happens ------------------------------------------------------------------------------------------

    @initialize(twice=st.booleans())
    def replies(self, twice: bool) -> None:
        self.store.twice = twice

    @rule(
        target=requests,
        owner=st.integers(0, 1),
        accounts=st.sampled_from([[0], [1], [0, 1]]),
        most=st.tuples(st.integers(0, 4000), st.integers(0, 400), st.just(1)),
    )
    def reserve(self, owner: int, accounts: list[int], most: tuple[int, int, int]) -> Any:
        owner = self.alive[owner]
        expected = self.verdict(accounts, most)
        # Naming an account twice counts it once.
        named = [ACCOUNTS[account] for account in [*accounts, accounts[0]]]
        try:
            real = self.run(self.ledgers[owner].reserve(named, charge(most), "request", wait_s=0))
        except BudgetSpent as error:
            assert expected in ("budget", "any"), error
            return multiple()
        except (RateLimited, TooManyInFlight) as error:
            assert expected == "any" or expected == ("rate" if isinstance(error, RateLimited) else "inflight"), error
            assert error.retry_after_s is not None and error.retry_after_s > 0
            return multiple()
        assert expected == "ok"
        self.heard[owner] = self.now
        request = Request(owner, accounts, most, self.now, real)
        for account in accounts:
            for unit, per, _ in self.rates(account):
                arrival = max(self.arrival.get((account, unit), 0), self.now) + per * most[unit]
                if per * most[unit] > 0:
                    self.arrival[account, unit] = request.ends_us[account, unit] = arrival
                self.arrival.setdefault((account, unit), 0)
        self.made.append(request)
        return request

    @rule(request=consumes(requests), share=st.floats(0, 1.2))
    def settle(self, request: Request, share: float) -> None:
        if request.owner not in self.alive:
            return
        # Not less than was sent, and sometimes more than was reserved.
        actual = (
            max(round(request.most[0] * share), request.said[0]),
            max(round(request.most[1] * share), request.said[1]),
            1,
        )
        for _ in range(2):  # the second settles nothing
            self.run(request.real.settle(charge(actual)))
        self.run(request.real.cancel())
        self.close(request, actual)
        request.settled = True

    @rule(request=consumes(requests))
    def cancel(self, request: Request) -> None:
        if request.owner not in self.alive or any(request.said):
            return
        self.run(request.real.cancel())
        self.close(request, (0, 0, 0))
        request.settled = True

    @rule(request=requests, share=st.floats(0, 1), noted=st.booleans())
    def send(self, request: Request, share: float, noted: bool) -> None:
        if request.owner not in self.alive or request.settled:
            return
        sent = tuple(max(a, round(b * share)) for a, b in zip(request.said, request.most, strict=True))
        request.said = (sent[0], sent[1], 1)
        request.real.sent(charge(request.said))
        if not noted:
            return
        self.run(self.ledgers[request.owner]._publish_notes())
        for other in self.made:
            if other.owner == request.owner and other.charged is None:
                other.noted = other.said

    @rule(us=st.integers(1, 2_000_000) | st.just(SILENCE_US))
    def time_passes(self, us: int) -> None:
        self.now += us
        self.run(self.store.set_clock(self.now))

    @rule(owner=st.integers(0, 1))
    def beat(self, owner: int) -> None:
        """A sign of life; what silent gateways hold is settled by what was noted, of living ones too."""
        owner = self.alive[owner]
        self.run(self.ledgers[owner]._beat())
        self.heard[owner] = self.now
        for request in self.made:
            if request.charged is None and self.now - self.heard[request.owner] >= SILENCE_US:
                self.close(request, request.noted)

    @rule(owner=st.integers(0, 1))
    def crash(self, owner: int) -> None:
        self.alive.pop(owner)
        self.new_gateway()

    @invariant()
    def books_agree(self) -> None:
        for account, said in enumerate(self.run(self.ledgers[self.alive[0]].usage(ACCOUNTS))):
            spent, held, inflight = self.books(account)
            for unit, name in enumerate(("usd", "tokens", "requests")):
                scale = 1e9 if unit == 0 else 1
                assert round(said["budget"][name]["spent"] * scale) == spent[unit], name
                assert round(said["budget"][name]["reserved"] * scale) == held[unit], name
                limit = said["budget"][name]["limit"]
                over = sum(
                    max(0, r.charged[unit] - r.most[unit])
                    for r in self.made
                    if r.charged is not None
                    and account in r.accounts
                    and r.made_us // WINDOW_US == self.now // WINDOW_US
                )
                # Beyond a limit goes only what requests cost beyond what was reserved for them.
                assert limit is None or spent[unit] + held[unit] <= round(limit * scale) + over
            assert said["inflight"]["now"] == inflight


VALKEY = ""


def test_charges_are_conserved() -> None:
    global VALKEY
    with EmbeddedValkey() as VALKEY:
        found = settings(
            max_examples=120,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )
        Books.TestCase.settings = found
        case = Books.TestCase()
        case.runTest()
