"""One account in the ledger: its keys and limits as the scripts take them, and their verdicts in words."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from signalbox.experts.base import ExpertError
from signalbox.policies.charges import Account, Charge

NANO = 1_000_000_000
UNITS = ("usd", "tokens", "requests")


class BudgetSpent(ExpertError):
    """What the request may cost does not fit into what is left of a budget (HTTP 402)."""

    status = 402
    code = "budget_spent"
    retryable = False


class RateLimited(ExpertError):
    """Requests or tokens came faster than a policy's rate (HTTP 429)."""

    status = 429
    code = "rate_limited"
    retryable = False


class TooManyInFlight(ExpertError):
    """As many requests as a policy allows are in flight already (HTTP 429)."""

    status = 429
    code = "max_inflight"
    retryable = False


class LedgerLost(ExpertError):
    """The store is lost, and a policy wants no request to go uncounted (HTTP 503)."""

    status = 503
    code = "store_lost"
    retryable = False


def amounts(charge: Charge) -> tuple[int, int, int]:
    """As the scripts count: nano-USD, tokens, requests."""
    return round(charge.usd * NANO), charge.tokens, charge.requests


def _window_us(account: Account) -> int:
    return round(account.limits.budget.window * 1e6) if account.limits.budget else 0


def books(account: Account) -> list[str]:
    """Keys of the account's budget and of its rates and requests in flight."""
    name = f"{account.policy}:{account.holder}"
    return [f"ledger:budget:{name}:{_window_us(account)}", f"ledger:flow:{name}"]


def limits(account: Account) -> list[str | int]:
    """The eight arguments of `RESERVE` for an account."""
    budget, rate = account.limits.budget, account.limits.rate
    found: list[str | int] = [_window_us(account), -1, -1, -1, 0, 0, 0, account.limits.slo.max_inflight or 0]
    if budget is not None:
        limits = (round(budget.usd * NANO) if budget.usd is not None else None, budget.tokens, budget.requests)
        found[1:4] = [-1 if limit is None else limit for limit in limits]
    if rate is not None:
        per_minute = (rate.requests_per_minute, rate.tokens_per_minute)
        found[4:6] = [repr(60e6 / pace) if pace else 0 for pace in per_minute]
        found[6] = round(rate.burst * 1e6)
    return found


def _figure(unit: str, amount: float) -> str:
    return f"{amount / NANO:.6g} USD" if unit == "usd" else f"{amount:.0f} {unit}"


def _time(microseconds: float) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def refusal(obstacle: Sequence[str], accounts: Sequence[Account], most: Charge) -> ExpertError:
    """The error for what `RESERVE` says stands in the way."""
    account = accounts[int(obstacle[1]) - 1]
    error = _refusal(obstacle, account, most)
    error.policy = account.policy
    return error


def _refusal(obstacle: Sequence[str], account: Account, most: Charge) -> ExpertError:
    what = obstacle[0]
    whom = f"policy '{account.policy}' of {account.holder.replace(':', ' ')}"
    if what in ("spent", "held"):
        unit = obstacle[2]
        limit, spent, held, ends = (float(part) for part in obstacle[3:])
        needed = amounts(most)[UNITS.index(unit)]
        text = f"the budget of {whom} is {_figure(unit, limit)} until {_time(ends)}; {_figure(unit, spent)} are spent"
        if held:
            text += f" and {_figure(unit, held)} are held by requests in flight"
        return BudgetSpent(f"{text}, and this request may need {_figure(unit, needed)}")
    if what == "rate":
        assert account.limits.rate is not None
        unit, wait_s = obstacle[2], float(obstacle[3]) / 1e6
        pace = account.limits.rate.model_dump()[f"{unit}_per_minute"]
        return RateLimited(
            f"{whom} allows {pace:g} {unit} a minute; come again in {wait_s:.3g} s", retry_after_s=wait_s
        )
    return TooManyInFlight(f"{whom} allows {obstacle[2]} requests in flight, and they are", retry_after_s=1.0)


def usage(account: Account, now: bytes, budget: list[bytes], flow: list[bytes]) -> dict[str, Any]:
    """What `READ` found, in words and USD."""
    now_us = int(now)
    book, pace = (
        {
            name.decode(): int(value)
            for name, value in zip(flat[::2], flat[1::2], strict=True)
            if not name.startswith(b"pace_")
        }
        for flat in (budget, flow)
    )
    limits = account.limits
    said: dict[str, Any] = {"policy": account.policy, "holder": account.holder, "budget": None, "rate": None}
    if limits.budget is not None:
        window = _window_us(account)
        index = max(now_us // window, book.get("index", -1))
        if book.get("index") != index:
            book = {}
        said["budget"] = {"window_s": limits.budget.window, "ends_at": _time((index + 1) * window)}
        for unit in UNITS:
            spent, held = book.get(unit, 0), book.get(f"held_{unit}", 0)
            said["budget"][unit] = {
                "limit": getattr(limits.budget, unit),
                "spent": spent / NANO if unit == "usd" else spent,
                "reserved": held / NANO if unit == "usd" else held,
            }
    if limits.rate is not None:
        said["rate"] = {"burst_s": limits.rate.burst}
        for unit in ("requests", "tokens"):
            limit = getattr(limits.rate, f"{unit}_per_minute")
            owed_us = max(0, pace.get(unit, 0) - now_us)
            least_us = 60e6 / limit if limit else 0.0
            wait_us = owed_us + least_us - max(limits.rate.burst * 1e6, least_us)
            said["rate"][unit] = {"per_minute": limit, "wait_s": max(0.0, wait_us) / 1e6 if limit else 0.0}
    said["inflight"] = {"limit": limits.slo.max_inflight, "now": pace.get("inflight", 0)}
    return said
