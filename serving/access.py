"""Who may ask, and for what: API keys and the tenants that they belong to, as the configuration declares them."""

from __future__ import annotations

from pydantic import Field

from signalbox.experts.catalog import Strict


class TenantConfig(Strict):
    """A customer, a team or an application: what it is given when the service is short, and what binds it."""

    policy: str | None = Field(
        None, description="whose limits bind all its requests, and who decides where neither request nor key says"
    )
    weight: float = Field(1.0, gt=0, le=1000, description="share of the service when tenants compete, relative")


class KeyConfig(Strict):
    """An API key. The key itself stands in the environment, never in the file."""

    env: str = Field(min_length=1, description="environment variable that holds the key")
    tenant: str | None = Field(None, description="whose key it is")
    policy: str | None = Field(
        None, description="whose limits bind this key's requests, and who decides where the request does not say"
    )
    policies: tuple[str, ...] = Field(("*",), description="globs of the policies that its requests may name")
    admin: bool = Field(False, description="whether it may change policies and adapters")


class AdmissionConfig(Strict):
    """The queues in front of the experts, shared by all gateways."""

    enabled: bool = Field(True, description="off: requests queue in the engines, first come, first served")
    max_queued: int = Field(128, ge=0, le=4096, description="requests of one priority that wait for one expert")
    max_wait_s: float = Field(
        60.0, gt=0, le=3600, description="how long a request waits at most where its policy promises no time, seconds"
    )
