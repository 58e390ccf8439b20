"""Who asks: the key that a request carries, the tenant behind it, whose limits bind it and who decides for it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from signalbox.experts.base import InvalidRequest
from signalbox.experts.catalog import matches
from signalbox.policies.base import Policy
from signalbox.policies.charges import Account
from signalbox.serving.config import Config

__all__ = ["Account", "Caller", "Callers", "require_admin"]

ANONYMOUS = "anonymous"


@dataclass(slots=True, frozen=True)
class Caller:
    """Whom a request is from. `key` and `tenant` are names, never the key itself; None: there is none.

    `weight` is the tenant's share when tenants compete, `policy` the key's, `tenant_policy` the tenant's, `policies`
    the globs of what its requests may name, `admin` whether it may change policies and adapters.
    """

    key: str | None
    tenant: str | None
    weight: float
    policy: str | None
    tenant_policy: str | None
    policies: tuple[str, ...]
    admin: bool

    @property
    def holder(self) -> str:
        """Whose share of the service its requests count to: its tenant's, or else its key's."""
        if self.tenant is not None:
            return f"tenant:{self.tenant}"
        return f"key:{self.key}" if self.key is not None else ANONYMOUS


# Whoever asks where no key is configured, and whoever has the key of `server.api_key_env`.
UNBOUND = Caller(None, None, 1.0, None, None, ("*",), True)


class Callers:
    """Tells callers by their API keys, which are held as SHA-256 digests alone.

    Raises `ValueError` where a key's environment variable is not set or empty, or where two keys are equal.
    `environment` is by default this process's.
    """

    def __init__(self, config: Config, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._by_digest: dict[bytes, Caller] = {}
        variables: dict[bytes, str] = {}
        declared = [("server.api_key_env", config.server.api_key_env, UNBOUND)] if config.server.api_key_env else []
        for name, key in config.keys.items():
            tenant = config.tenants[key.tenant] if key.tenant is not None else None
            caller = Caller(
                key=name,
                tenant=key.tenant,
                weight=tenant.weight if tenant is not None else 1.0,
                policy=key.policy,
                tenant_policy=tenant.policy if tenant is not None else None,
                policies=key.policies,
                admin=key.admin,
            )
            declared.append((f"keys.{name}.env", key.env, caller))
        for where, variable, caller in declared:
            secret = environment.get(variable, "")
            if not secret.strip():
                raise ValueError(f"{where} names {variable}, which is not set: set it, or leave {where} out")
            digest = _digest(secret.strip().encode())
            if digest in variables:
                raise ValueError(
                    f"{where}: the environment variables {variables[digest]} and {variable} hold the same key; "
                    "each key needs one of its own"
                )
            variables[digest] = variable
            self._by_digest[digest] = caller

    def identify(self, headers: Mapping[bytes, bytes]) -> Caller:
        """Whose key the request carries, as bearer token or `x-api-key`. Raises `InvalidRequest` (401)."""
        if not self._by_digest:
            return UNBOUND
        given = headers.get(b"x-api-key", b"").strip()
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            given = token.strip()
        caller = self._by_digest.get(_digest(given)) if given else None
        if caller is None:
            said = "the API key is wrong" if given else "an API key is needed, as bearer token or x-api-key"
            raise InvalidRequest(said, code="invalid_api_key", status=401)
        return caller

    def policy_of(self, caller: Caller, named: str | None, default: str | None) -> str | None:
        """Who decides: the policy that the request names, else the key's, else the tenant's, else `default`.

        Raises `InvalidRequest` (403) where the key may not name it.
        """
        if named is None:
            return caller.policy or caller.tenant_policy or default
        if not matches(named, caller.policies):
            raise InvalidRequest(
                f"this key may not ask for policy '{named[:64]}'; it may name: {', '.join(caller.policies) or 'none'}",
                param="model",
                code="policy_not_allowed",
                status=403,
            )
        return named

    def accounts(self, caller: Caller, named: str | None, policies: Mapping[str, Policy]) -> list[Account]:
        """Whose limits bind a request: the tenant's policy by tenant, the key's and the named one by caller.

        A policy that is not in the table (it has just been removed) binds nobody. One that is in force twice for the
        same holder counts once.
        """
        holder = f"key:{caller.key}" if caller.key is not None else ANONYMOUS
        bound: Sequence[tuple[str | None, str]] = (
            (caller.tenant_policy, f"tenant:{caller.tenant}"),
            (caller.policy, holder),
            (named, holder),
        )
        wanted = dict.fromkeys((policy, whom) for policy, whom in bound if policy is not None and policy in policies)
        return [Account(policy, whom, policies[policy]) for policy, whom in wanted]


def require_admin(caller: Caller) -> None:
    """Raises `InvalidRequest` (403) where the caller may not change policies and adapters."""
    if not caller.admin:
        raise InvalidRequest(
            "this needs a key with `admin: true`: it changes what all callers are served",
            code="admin_only",
            status=403,
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
