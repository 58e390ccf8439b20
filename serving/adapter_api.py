"""`/v1/adapters`, and vLLM's `/v1/load_lora_adapter` and `/v1/unload_lora_adapter` over the same registry."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from signalbox.adapters.base import AdapterError
from signalbox.experts.base import InvalidRequest, Unsupported
from signalbox.experts.catalog import LocalExpert
from signalbox.serving.adapter_table import AdapterTable
from signalbox.serving.config import Config
from signalbox.serving.config_source import nearest
from signalbox.serving.exchange import Exchange, Handler
from signalbox.serving.protocols.fields import boolean, integer, kind_of
from signalbox.serving.protocols.openai import parse_json

MAX_BODY_BYTES = 64 * 1024
LOAD_S = 120.0  # that vLLM's endpoint waits for an adapter to be ready
PAUSE_S = 0.25

_FIELDS = ("name", "base", "path", "replicas", "pinned")
# vLLM's; those that mean nothing here are taken and ignored.
_VLLM_LOAD = ("lora_name", "lora_path", "load_inplace", "base_model_name", "is_3d_lora_weight")
_VLLM_UNLOAD = ("lora_name", "lora_int_id")


def takes_adapters(config: Config) -> bool:
    """Whether any expert does."""
    return bool(_bases(config))


def _bases(config: Config) -> list[str]:
    return [name for name, expert in config.experts.items() if isinstance(expert, LocalExpert) and expert.max_adapters]


class AdapterApi:
    """Handlers of the adapter routes: `routes` by path, `named` for `/v1/adapters/NAME`."""

    def __init__(self, config: Config, table: AdapterTable | None) -> None:
        self._config = config
        self._table = table
        self.routes: dict[str, dict[str, Handler]] = {
            "/v1/adapters": {"GET": self._list, "POST": self._add},
            "/v1/load_lora_adapter": {"POST": self._vllm_load},
            "/v1/unload_lora_adapter": {"POST": self._vllm_unload},
        }
        self.named: dict[str, Handler] = {"GET": self._show, "DELETE": self._remove}

    # -- ours --------------------------------------------------------------------------------------------------

    async def _list(self, exchange: Exchange) -> None:
        records = await self._table.describe() if self._table is not None else []
        await exchange.reply(200, {"object": "list", "data": records})

    async def _show(self, exchange: Exchange) -> None:
        name = _name_of(exchange)
        records = await self._table.describe(name) if self._table is not None else []
        if not records:
            raise _not_found(name)
        await exchange.reply(200, records[0])

    async def _add(self, exchange: Exchange) -> None:
        self._require()
        body = await self._body(exchange, _FIELDS)
        name, path = _text(body, "name"), _text(body, "path")
        replicas = integer(body, "replicas", low=1, high=1024) if body.get("replicas") is not None else None
        record = await self._register(
            name, self._base(body.get("base"), "base"), path, replicas, boolean(body, "pinned")
        )
        await exchange.reply(202, record)

    async def _remove(self, exchange: Exchange) -> None:
        await exchange.reply(202, await self._require().remove(_name_of(exchange)))

    # -- vLLM's ------------------------------------------------------------------------------------------------

    async def _vllm_load(self, exchange: Exchange) -> None:
        body = await self._body(exchange, _VLLM_LOAD)
        table, name = self._require(), _text(body, "lora_name")
        if not boolean(body, "load_inplace") and await table.current(name) is not None:
            raise InvalidRequest(
                f"the adapter '{name}' has already been loaded; to replace it set load_inplace to true",
                param="lora_name",
                code="already_loaded",
            )
        base = self._base(body.get("base_model_name"), "base_model_name")
        record = await self._register(name, base, _text(body, "lora_path"), None, False)
        version, deadline = record["version"], time.monotonic() + LOAD_S
        while True:
            record = await table.wait(name, version=version, timeout_s=max(0.0, deadline - time.monotonic()))
            # Slots are short: it was ready, and already made room for others that are in use.
            done = record["phase"] == "ready" or (record.get("evicted") and record["serving"] == version)
            # Staged although it was ready: a replica has just died or is coming, which is repaired.
            if done or record["phase"] != "staged" or time.monotonic() > deadline:
                break
            await asyncio.sleep(PAUSE_S)
        if not done:
            raise InvalidRequest(
                f"the adapter '{name}' could not be loaded: {record.get('reason') or record['phase']}",
                code="adapter_failed",
                status=422,
            )
        await _succeed(exchange, f"LoRA adapter '{name}' added successfully.")

    async def _vllm_unload(self, exchange: Exchange) -> None:
        body = await self._body(exchange, _VLLM_UNLOAD)
        table, name = self._require(), _text(body, "lora_name")
        await table.remove(name)
        await table.wait(name, timeout_s=LOAD_S)
        await _succeed(exchange, f"LoRA adapter '{name}' removed successfully.")

    # -- inside ------------------------------------------------------------------------------------------------

    async def _register(self, name: str, base: str, path: str, replicas: int | None, pinned: bool) -> dict[str, Any]:
        try:
            return await self._require().add(name=name, base=base, path=path, replicas=replicas, pinned=pinned)
        except AdapterError as error:
            raise InvalidRequest(error.message, param=error.tensor, code=error.code, status=422) from error

    def _require(self) -> AdapterTable:
        if self._table is None:
            raise Unsupported("no expert takes adapters: set max_adapters of one in the configuration")
        return self._table

    def _base(self, given: Any, field: str) -> str:
        """The expert to adapt; may be left out where only one takes adapters."""
        bases = _bases(self._config)
        if given is None and len(bases) == 1:
            return bases[0]
        if given is None:
            raise InvalidRequest(f"'{field}' is missing; experts that take adapters: {', '.join(bases)}", param=field)
        if not isinstance(given, str):
            raise InvalidRequest(f"'{field}' must be a string, not {kind_of(given)}", param=field)
        if given in bases:
            return given
        if given in self._config.experts:
            said = f"expert '{given}' takes no adapters; those that do: {', '.join(bases) or 'none'}"
        else:
            said = f"there is no expert '{given[:64]}'; {nearest(given, bases)}"
        raise InvalidRequest(said, param=field, code="unknown_base", status=422)

    async def _body(self, exchange: Exchange, fields: tuple[str, ...]) -> dict[str, Any]:
        body = parse_json(await exchange.body(MAX_BODY_BYTES))
        for name in body:
            if name not in fields:
                raise InvalidRequest(f"there is no field '{name[:64]}'; {nearest(name, list(fields))}", param=name[:64])
        return body


def _name_of(exchange: Exchange) -> str:
    """The name at the end of the path; `base:name` will do."""
    return exchange.path.removeprefix("/v1/adapters/").rpartition(":")[2]


def _text(body: dict[str, Any], field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not value:
        said = "is missing" if value is None else f"must be a non-empty string, not {kind_of(value)}"
        raise InvalidRequest(f"'{field}' {said}", param=field)
    return value


def _not_found(name: str) -> InvalidRequest:
    return InvalidRequest(f"there is no adapter '{name[:64]}'", code="adapter_not_found", status=404)


async def _succeed(exchange: Exchange, text: str) -> None:
    """A line of text, as vLLM's server answers here."""
    data = f"Success: {text}".encode()
    await exchange.start(200, [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(data))])
    await exchange.send(data, more=False)
