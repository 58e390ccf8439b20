"""Who asks: keys, tenants, whose limits bind, and who decides."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from signalbox.experts.base import InvalidRequest
from signalbox.policies.base import Policy
from signalbox.serving.callers import Callers, require_admin
from signalbox.serving.config import Config

ENVIRONMENT = {"CI": "sk-ci", "APP": "sk-app\n", "OPS": "sk-ops", "OLD": "sk-old"}
POLICIES = {name: Policy(description=name) for name in ("gold", "silver", "bronze")}


def callers(environment: dict[str, str] = ENVIRONMENT, **sections: Any) -> Callers:
    data: dict[str, Any] = {
        "experts": {"remote": {"engine": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "x"}},
        "policies": {name: {} for name in POLICIES},
        "tenants": {"acme": {"policy": "gold", "weight": 3}, "other": {}},
        "keys": {
            "ci": {"env": "CI", "tenant": "acme", "policy": "silver", "policies": ["silver", "br*"]},
            "app": {"env": "APP", "tenant": "acme"},
            "ops": {"env": "OPS", "admin": True, "policies": []},
        },
    }
    return Callers(Config.model_validate(data | sections), environment)


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + key.encode()}


def test_a_caller_is_told_by_its_key() -> None:
    who = callers()
    ci = who.identify(bearer("sk-ci"))
    assert (ci.key, ci.tenant, ci.weight, ci.policy, ci.tenant_policy) == ("ci", "acme", 3, "silver", "gold")
    assert ci.policies == ("silver", "br*") and not ci.admin
    app = who.identify({b"x-api-key": b"sk-app"})  # the newline at the end of its variable is none of the key's
    assert (app.key, app.tenant, app.policy, app.policies) == ("app", "acme", None, ("*",))
    ops = who.identify({b"authorization": b"bearer  sk-ops ", b"x-api-key": b"sk-ci"})
    assert (ops.key, ops.tenant, ops.weight, ops.tenant_policy, ops.admin) == ("ops", None, 1, None, True)


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "an API key is needed, as bearer token or x-api-key"),
        (bearer(""), "an API key is needed, as bearer token or x-api-key"),
        (bearer("sk-wrong"), "the API key is wrong"),
        (bearer("sk-c"), "the API key is wrong"),
        ({b"x-api-key": b"CI"}, "the API key is wrong"),
        ({b"authorization": b"Basic sk-ci"}, "an API key is needed, as bearer token or x-api-key"),
    ],
)
def test_a_wrong_key(headers: dict[bytes, bytes], said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(InvalidRequest) as caught:
        callers().identify(headers)
    assert (caught.value.status, caught.value.code, caught.value.message) == (401, "invalid_api_key", said)
    assert "sk-" not in caplog.text


def test_without_keys_everybody_may_ask_and_change_things() -> None:
    who = callers(keys={})
    for headers in ({}, bearer("anything")):
        caller = who.identify(headers)
        assert (caller.key, caller.tenant, caller.admin, caller.policies) == (None, None, True, ("*",))
        require_admin(caller)


def test_the_servers_own_key_is_bound_by_nothing_and_may_change_things() -> None:
    for keys in ({}, {"ci": {"env": "CI"}}):
        who = callers(server={"api_key_env": "OLD"}, keys=keys)
        caller = who.identify(bearer("sk-old"))
        assert (caller.key, caller.admin) == (None, True) and who.accounts(caller, None, POLICIES) == []
        with pytest.raises(InvalidRequest):
            who.identify({})


def test_an_admins_key_is_needed_to_change_things() -> None:
    who = callers()
    require_admin(who.identify(bearer("sk-ops")))
    with pytest.raises(InvalidRequest) as caught:
        require_admin(who.identify(bearer("sk-ci")))
    assert (caught.value.status, caught.value.code) == (403, "admin_only")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"APP": "a", "OPS": "o"}, "keys.ci.env names CI, which is not set"),
        ({**ENVIRONMENT, "CI": " "}, "keys.ci.env names CI, which is not set"),
        ({**ENVIRONMENT, "CI": "sk-app"}, "keys.app.env: the environment variables CI and APP hold the same key"),
    ],
)
def test_keys_that_cannot_be(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        callers(environment)
    assert str(caught.value).startswith(said) and "sk-" not in str(caught.value)


def test_no_object_shows_a_key() -> None:
    who = callers()
    assert "sk-" not in repr(vars(who)) and "sk-" not in repr(who.identify(bearer("sk-ci")))


def test_who_decides() -> None:
    who = callers()
    ci, app, ops = (who.identify(bearer(f"sk-{name}")) for name in ("ci", "app", "ops"))
    assert who.policy_of(ci, "bronze", "default") == "bronze"
    assert who.policy_of(ci, None, "default") == "silver"
    assert who.policy_of(app, None, "default") == "gold"
    assert who.policy_of(ops, None, "default") == "default" and who.policy_of(ops, None, None) is None
    with pytest.raises(InvalidRequest) as caught:
        who.policy_of(ci, "gold", "default")
    assert (caught.value.status, caught.value.code) == (403, "policy_not_allowed")
    assert caught.value.message == "this key may not ask for policy 'gold'; it may name: silver, br*"
    with pytest.raises(InvalidRequest, match="may name: none"):
        who.policy_of(ops, "gold", None)


def test_whose_limits_bind() -> None:
    who = callers()
    ci, app, ops = (who.identify(bearer(f"sk-{name}")) for name in ("ci", "app", "ops"))

    def bound(caller: Any, named: str | None, policies: dict[str, Policy] = POLICIES) -> list[tuple[str, str]]:
        found = who.accounts(caller, named, policies)
        assert all(account.limits is policies[account.policy] for account in found)
        return [(account.policy, account.holder) for account in found]

    assert bound(ci, None) == [("gold", "tenant:acme"), ("silver", "key:ci")]
    assert bound(ci, "bronze") == [("gold", "tenant:acme"), ("silver", "key:ci"), ("bronze", "key:ci")]
    assert bound(ci, "silver") == bound(ci, None), "once for the same holder"
    assert bound(app, "gold") == [("gold", "tenant:acme"), ("gold", "key:app")]
    assert bound(ops, None) == [] and bound(ops, "gold") == [("gold", "key:ops")]
    assert bound(callers(keys={}).identify({}), "gold") == [("gold", "anonymous")]
    assert bound(ci, None, {"silver": POLICIES["silver"]}) == [("silver", "key:ci")]
