"""`GET /v1/usage`: what the caller has spent of its budgets and rates, as the books say."""

from __future__ import annotations

from signalbox.experts.base import ExpertUnavailable
from signalbox.experts.catalog import matches
from signalbox.serving.callers import Callers
from signalbox.serving.exchange import Exchange
from signalbox.serving.ledger import Ledger
from signalbox.serving.policy_table import PolicyTable
from signalbox.serving.store import StoreUnavailable


class UsageApi:
    """The handler of this route."""

    def __init__(self, callers: Callers, policies: PolicyTable, ledger: Ledger) -> None:
        self._callers = callers
        self._policies = policies
        self._ledger = ledger

    async def usage(self, exchange: Exchange) -> None:
        """One entry for each account with limits: of the key, of its tenant, and of policies that it may name."""
        caller, policies = exchange.caller, self._policies.policies()
        named: list[str | None] = [None, *(name for name in policies if matches(name, caller.policies))]
        accounts = {
            (account.policy, account.holder): account
            for name in named
            for account in self._callers.accounts(caller, name, policies)
            if account.limited
        }
        try:
            data = await self._ledger.usage(list(accounts.values())) if accounts else []
        except StoreUnavailable as error:
            said = f"the books cannot be read now: {error}"
            raise ExpertUnavailable(said, code="store_lost", retry_after_s=1.0) from None
        await exchange.reply(200, {"object": "list", "key": caller.key, "tenant": caller.tenant, "data": data})
