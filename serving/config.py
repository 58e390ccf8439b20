"""The configuration: one YAML file, checked strictly and before anything is started.

Every problem is reported at once, one a line, with its file, line, key and the nearest right key. Environment
variables override single values: `SIGNALBOX__STORE__URL=redis://10.0.0.5/0` sets `store.url`.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from signalbox.adapters.base import Limits
from signalbox.experts.catalog import ExpertConfig, LocalExpert, Strict, VllmExpert
from signalbox.experts.vllm_arguments import argument_problems, installed
from signalbox.policies.base import Policy
from signalbox.serving.access import AdmissionConfig, KeyConfig, TenantConfig
from signalbox.serving.config_source import (
    ConfigError,
    KeyPath,
    Problem,
    apply_overrides,
    describe,
    nearest,
    read_yaml,
)
from signalbox.serving.policy_check import Findings, check_policy

__all__ = [
    "AdapterConfig",
    "AdapterFiles",
    "CacheConfig",
    "Config",
    "ConfigError",
    "OutcomesConfig",
    "RouterConfig",
    "ServerConfig",
    "StoreConfig",
    "adapter_limits",
    "load_config",
    "missing_environment",
    "policies_in_use",
]

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_NAMES = 256  # bounds every map and every label set that is keyed by a configured name


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            "a name has letters, digits, '.', '_' and '-', starts with a letter or digit, and is 64 characters at most"
        )
    if name.lower() == "auto":
        raise ValueError("'auto' is the name that asks the router to choose; call this one something else")
    return name


Name = Annotated[str, AfterValidator(_check_name)]


class ServerConfig(Strict):
    """Where the service listens and what it accepts."""

    host: str = Field("127.0.0.1", description="address to bind; beyond loopback only together with API keys")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes any free one")
    gateways: int = Field(1, ge=1, le=64, description="gateway processes")
    api_key_env: str | None = Field(
        None,
        min_length=1,
        description="environment variable with the key that clients must send, as bearer token or `x-api-key`",
    )
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024, le=1 << 30, description="largest request body, bytes")

    @field_validator("host")
    @classmethod
    def _address(cls, host: str) -> str:
        try:
            return str(ipaddress.IPv4Address("127.0.0.1" if host == "localhost" else host))
        except ValueError:
            raise ValueError("must be an IPv4 address such as 127.0.0.1") from None


class StoreConfig(Strict):
    """Where shared state lives: an embedded Valkey, or any Redis-compatible server."""

    url: str = Field("embedded", repr=False, description="`embedded`, or redis://, rediss:// or unix:// address")
    data_dir: Path | None = Field(None, description="folder where the embedded Valkey persists; default: memory only")

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: str) -> str:  # the message never repeats the address: it may hold a password
        if url != "embedded" and not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must be 'embedded' or start with redis://, rediss:// or unix://")
        return url

    @model_validator(mode="after")
    def _data_dir_is_ours(self) -> StoreConfig:
        if self.data_dir is not None and self.url != "embedded":
            raise ValueError("data_dir is for url: embedded; another server keeps its data itself")
        return self


class CacheConfig(Strict):
    """The cache of finished answers. Whether a request uses it is said by its policy and by the request."""

    ttl_s: float = Field(3600.0, ge=1, description="seconds that an answer is kept where the request says nothing")
    max_ttl_s: float = Field(7 * 86400.0, ge=1, description="most seconds that a request may ask for")
    max_entry_bytes: int = Field(256 * 1024, ge=1024, description="longer answers are not kept, bytes")
    max_memory_mib: int = Field(256, ge=16, description="memory of the embedded Valkey, MiB; oldest answers go first")


class OutcomesConfig(Strict):
    """Decisions kept for `POST /v1/outcomes`, and what is learned from the outcomes."""

    learn: bool = Field(True, description="whether the router learns from outcomes while it serves")
    ttl_s: float = Field(86400.0, ge=1, le=30 * 86400, description="seconds that a decision waits for its outcome")
    max_pending: int = Field(
        20_000, ge=1, le=10_000_000, description="decisions kept; the oldest go first (some 2 kB each)"
    )
    log_length: int = Field(
        10_000, ge=100, le=1_000_000, description="outcomes kept for gateways that start later (some 1 kB each)"
    )


class AdapterConfig(Strict):
    """An adapter that is registered at the start; others come and go by `/v1/adapters`."""

    base: Name = Field(description="the expert whose model it adapts")
    path: Path = Field(description="folder with adapter_config.json (LoRA) or expert_cfg.json (ESFT) and safetensors")
    replicas: int | None = Field(None, ge=1, description="replicas of the base that hold it; default: all")
    pinned: bool = Field(False, description="never evicted when slots are short")
    routable: bool = Field(True, description="whether `auto` may choose it, once a router has been trained on it")


class AdapterFiles(Strict):
    """Where adapters may come from, and how large they may be."""

    roots: tuple[Path, ...] = Field(
        (Path(),),
        min_length=1,
        max_length=64,
        description="folders below which a registered adapter must lie; default: this file's",
    )
    max_mib: int = Field(8192, ge=1, description="largest adapter, MiB")
    max_adapters: int = Field(256, ge=1, le=4096, description="names registered at once, loaded or not")
    watch: Path | None = Field(
        None,
        description="a folder with a subfolder BASE/NAME for each adapter: what is put there is registered, what is "
        "taken away is removed; one of the roots",
    )


class RouterConfig(Strict):
    """A trained router."""

    kind: str = Field(
        "best", description="which predictor it must be, e.g. tryage; best: whichever `router train` chose"
    )
    artifact: Path = Field(description="folder with router.json and router.safetensors")

    @property
    def wanted(self) -> str | None:
        """The kind that the artifact must be of; None: any."""
        return None if self.kind == "best" else self.kind


class Config(Strict):
    """The whole configuration file."""

    server: ServerConfig = Field(default_factory=lambda: ServerConfig(), description="where the service listens")
    store: StoreConfig = Field(default_factory=lambda: StoreConfig(), description="where shared state lives")
    experts: dict[Name, ExpertConfig] = Field(min_length=1, max_length=_MAX_NAMES, description="the pool, by name")
    adapters: dict[Name, AdapterConfig] = Field(
        default_factory=dict, max_length=_MAX_NAMES, description="adapters registered at the start, by name"
    )
    adapter_files: AdapterFiles = Field(
        default_factory=lambda: AdapterFiles(), description="where adapters may come from"
    )
    routers: dict[Name, RouterConfig] = Field(
        default_factory=dict, max_length=_MAX_NAMES, description="trained routers, by name"
    )
    policies: dict[Name, Policy] = Field(
        default_factory=dict, max_length=_MAX_NAMES, description="SLAs, asked for as `auto:NAME`"
    )
    default_router: str = Field("default", description="the router that `auto` asks")
    default_policy: str | None = Field(None, description="the policy of plain `auto`; none: highest predicted quality")
    keys: dict[Name, KeyConfig] = Field(
        default_factory=dict, max_length=1024, description="API keys by name; none: everybody may ask"
    )
    tenants: dict[Name, TenantConfig] = Field(
        default_factory=dict, max_length=_MAX_NAMES, description="whom keys belong to, by name"
    )
    admission: AdmissionConfig = Field(
        default_factory=lambda: AdmissionConfig(), description="the queues in front of the experts"
    )
    cache: CacheConfig = Field(default_factory=lambda: CacheConfig(), description="the cache of finished answers")
    outcomes: OutcomesConfig = Field(
        default_factory=lambda: OutcomesConfig(), description="feedback on answers, and learning from it"
    )


def load_config(
    path: str | Path,
    *,
    environment: Mapping[str, str] | None = None,
    on_warning: Callable[[str], None] | None = None,
    check_artifacts: bool = False,
) -> Config:
    """Read, override and check the configuration file; relative paths in it start at its folder.

    `environment` (default: this process's) may hold `SIGNALBOX__...` overrides. `on_warning` takes what is odd
    but usable (default: the log). `check_artifacts` asks that the routers have been trained, which is so before
    serving but not before `signalbox router collect`. Raises `ConfigError` with every problem found.
    """
    path = Path(path)
    source = read_yaml(path)
    problems = apply_overrides(Config, source, os.environ if environment is None else environment)
    try:
        config = Config.model_validate(source.data)
    except ValidationError as error:
        problems += [describe(Config, source, item) for item in error.errors(include_url=False)]
        raise ConfigError(source.messages(problems)) from None
    config = _with_absolute_paths(config, path.resolve().parent)
    problems += _problems(config)
    if check_artifacts:
        problems += _artifact_problems(config)
    if problems:
        raise ConfigError(source.messages(problems))
    for warning in source.messages(_warnings(config)):
        (on_warning or log.warning)(warning)
    return config


def missing_environment(config: Config) -> list[str]:
    """Names of environment variables that the configuration counts on and that are not set (or empty)."""
    names = [config.server.api_key_env, *(key.env for key in config.keys.values())]
    names += [*(getattr(e, "api_key_env", None) for e in config.experts.values())]
    return sorted({name for name in names if name and not os.environ.get(name)})


def policies_in_use(config: Config) -> dict[str, str]:
    """Policies that the configuration counts on -> who uses them; they cannot be deleted."""
    used = {tenant.policy: f"tenant {name}" for name, tenant in config.tenants.items() if tenant.policy}
    used |= {key.policy: f"key {name}" for name, key in config.keys.items() if key.policy}
    return used | ({config.default_policy: "default_policy"} if config.default_policy else {})


def is_local(model: str) -> bool:
    """Whether a model reference is a path on this machine."""
    return not model.startswith(("pypi:", "hf:"))


def _with_absolute_paths(config: Config, folder: Path) -> Config:
    def absolute(path: str | Path) -> Path:
        return Path(os.path.normpath(folder / Path(path).expanduser()))

    experts = {
        name: expert.model_copy(update={"model": str(absolute(expert.model))})
        if isinstance(expert, LocalExpert) and is_local(expert.model)
        else expert
        for name, expert in config.experts.items()
    }
    routers = {
        name: router.model_copy(update={"artifact": absolute(router.artifact)})
        for name, router in config.routers.items()
    }
    adapters = {
        name: adapter.model_copy(update={"path": absolute(adapter.path)}) for name, adapter in config.adapters.items()
    }
    files = config.adapter_files
    watch = absolute(files.watch) if files.watch is not None else None
    files = files.model_copy(update={"roots": tuple(absolute(root) for root in files.roots), "watch": watch})
    store = config.store
    if store.data_dir is not None:
        store = store.model_copy(update={"data_dir": absolute(store.data_dir)})
    return config.model_copy(
        update={"experts": experts, "adapters": adapters, "adapter_files": files, "routers": routers, "store": store}
    )


def adapter_limits(config: Config, base: str) -> Limits:
    """What may be registered on this expert: below the roots, the watched folder, or named by the configuration."""
    files = config.adapter_files
    named = tuple(adapter.path for adapter in config.adapters.values())
    watched = (files.watch,) if files.watch is not None else ()
    expert = config.experts[base]
    rank, kinds = (expert.max_adapter_rank, expert.adapter_kinds) if isinstance(expert, LocalExpert) else (0, ())
    return Limits((*files.roots, *watched, *named), max_bytes=files.max_mib << 20, max_rank=rank, kinds=kinds)


def _problems(config: Config) -> list[Problem]:
    """What only the whole can tell: references between sections, and files that must be there."""
    found: list[Problem] = []
    if not any(expert.routable for expert in config.experts.values()):
        found.append(Problem(("experts",), "no expert is routable, so `auto` has nothing to choose from"))
    for name, expert in config.experts.items():
        if isinstance(expert, LocalExpert) and is_local(expert.model) and not Path(expert.model).exists():
            found.append(
                Problem(
                    ("experts", name, "model"),
                    f"there is no such file or folder ({expert.model}); "
                    "a model is `pypi:PACKAGE`, `hf:ORG/NAME` or a path",
                )
            )
        if isinstance(expert, VllmExpert):
            found += [
                Problem(("experts", name, "engine_args", key), text)
                for key, text in argument_problems(expert.engine_args, esft="esft" in expert.adapter_kinds)
            ]
    found += _adapter_problems(config)
    found += _access_problems(config)
    found += _policy_problems(config)
    named_or_needed = config.routers or "default_router" in config.model_fields_set
    if named_or_needed and config.default_router not in config.routers:
        found.append(Problem(("default_router",), _unknown("router", config.default_router, config.routers)))
    return found


def _access_problems(config: Config) -> list[Problem]:
    """Keys, tenants and the policies that they name; and no open door."""
    found: list[Problem] = []
    host = config.server.host
    if not ipaddress.IPv4Address(host).is_loopback and not config.server.api_key_env and not config.keys:
        text = f"{host} is reachable from outside this machine: set server.api_key_env, or declare keys"
        found.append(Problem(("server", "host"), text))
    references: list[tuple[KeyPath, str | None]] = [(("default_policy",), config.default_policy)]
    references += [(("keys", name, "policy"), key.policy) for name, key in config.keys.items()]
    references += [(("tenants", name, "policy"), tenant.policy) for name, tenant in config.tenants.items()]
    found += [
        Problem(path, _unknown("policy", policy, config.policies))
        for path, policy in references
        if policy is not None and policy not in config.policies
    ]
    holders = {config.server.api_key_env: "server.api_key_env"}
    for name, key in config.keys.items():
        if key.tenant is not None and key.tenant not in config.tenants:
            found.append(Problem(("keys", name, "tenant"), _unknown("tenant", key.tenant, config.tenants)))
        first = holders.setdefault(key.env, f"keys.{name}.env")
        if first != f"keys.{name}.env":
            text = f"{first} names {key.env} as well: each key needs a variable of its own"
            found.append(Problem(("keys", name, "env"), text))
    return found


def _policy_findings(config: Config) -> Iterator[tuple[str, Findings]]:
    """What is wrong or odd with each policy, held against the pool."""
    known = [*config.experts, *config.adapters, *(f"{a.base}:{name}" for name, a in config.adapters.items())]
    for name, policy in config.policies.items():
        yield name, check_policy(policy, known)


def _policy_problems(config: Config) -> list[Problem]:
    found = [
        Problem(("policies", name, *problem.path), problem.text)
        for name, findings in _policy_findings(config)
        for problem in findings.problems
    ]
    if "validate" in config.policies:
        found.append(Problem(("policies", "validate"), "a route of the API has this name: call the policy otherwise"))
    return found


def _adapter_problems(config: Config) -> list[Problem]:
    found: list[Problem] = []
    for name, adapter in config.adapters.items():
        base = config.experts.get(adapter.base)
        if base is None:
            found.append(Problem(("adapters", name, "base"), _unknown("expert", adapter.base, config.experts)))
        elif not isinstance(base, LocalExpert) or not base.max_adapters:
            text = f"expert '{adapter.base}' takes no adapters: "
            text += "set its max_adapters" if isinstance(base, LocalExpert) else f"its engine is {base.engine}"
            found.append(Problem(("adapters", name, "base"), text))
        if name in config.experts:
            found.append(Problem(("adapters", name), "an expert has this name: call the adapter something else"))
        if not adapter.path.is_dir():
            found.append(Problem(("adapters", name, "path"), f"there is no such folder ({adapter.path})"))
    return found


def _unknown(what: str, name: str, known: Mapping[str, Any]) -> str:
    return f"there is no {what} '{name}'; {nearest(name, list(known)) if known else f'no {what} is declared'}"


def _artifact_problems(config: Config) -> list[Problem]:
    """Artifacts that cannot be used, as far as their cover sheets tell; tensors are checked when they are loaded."""
    found = []
    for name, router in config.routers.items():
        sheet = router.artifact / "router.json"
        try:
            kind = json.loads(sheet.read_text())["kind"]
        except FileNotFoundError:
            text = (
                f"there is no router in {router.artifact}; `make router-quickstart` or `signalbox router train` does it"
            )
        except (OSError, ValueError, KeyError, TypeError):
            text = f"{sheet} cannot be read as a router's description"
        else:
            if router.wanted in (None, kind):
                continue
            text = f"the router in {router.artifact} is of kind '{kind}', not '{router.kind}'"
        found.append(Problem(("routers", name, "artifact"), text))
    return found


def _warnings(config: Config) -> list[Problem]:
    found: list[Problem] = []
    if not config.routers:
        found.append(Problem(("routers",), "no router is declared: `auto` goes by price and latency alone"))
    found += [
        Problem(("experts", name, "engine"), "vLLM is not installed here: this expert will not start")
        for name, expert in config.experts.items()
        if isinstance(expert, VllmExpert) and not installed()
    ]
    found += [
        Problem(("policies", name, *warning.path), warning.text)
        for name, findings in _policy_findings(config)
        for warning in findings.warnings
    ]
    return found
