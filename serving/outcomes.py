"""Outcomes: decisions on record, what came of them, and the one ordered log from which every gateway learns.

In the store:

    record:<request id>        a decision, as `GET /v1/decisions/{id}` tells it, and what may be learned from it
    records                    ids of the decisions kept, by time: it bounds their number
    idempotency:<digest>       what an Idempotency-Key was used for
    outcomes:<router>          stream: one entry an outcome, in the order in which the store took them
    learned:<router>:<version> what was learned up to an entry of that stream

No record holds a word of prompt or answer: features, predictions and the choice.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from signalbox.experts.base import ExpertUnavailable, InvalidRequest
from signalbox.router.online import OnlineState, Outcome
from signalbox.serving.config import OutcomesConfig
from signalbox.serving.dispatch import Run
from signalbox.serving.exchange import SANE_ID
from signalbox.serving.protocols.fields import kind_of
from signalbox.serving.store import Store, StoreUnavailable

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4096
MAX_KEY = 255  # characters of an Idempotency-Key
START = "0-0"  # before the first entry of a stream
SNAPSHOT_TTL_S = 30 * 86400.0

# KEYS: record, index. ARGV: decision, evidence, time to live in ms, most records.
_RECORD = """
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'decision', ARGV[1], 'evidence', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('ZADD', KEYS[2], now, KEYS[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - ARGV[3])
local over = redis.call('ZCARD', KEYS[2]) - ARGV[4]
if over > 0 then
  local oldest = redis.call('ZPOPMIN', KEYS[2], over)
  for i = 1, #oldest, 2 do redis.call('DEL', oldest[i]) end
end
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 1
"""

# KEYS: record, stream, idempotency. ARGV: score, digest of the body, time to live in ms, length of the stream,
# whether there is an Idempotency-Key. The key is looked up first: what it was used for stays so, whatever became of
# the record. A score that the record has already is the same outcome again, and is not counted twice.
_OUTCOME = """
if ARGV[5] == '1' then
  local used = redis.call('HMGET', KEYS[3], 'body', 'reply')
  if used[1] and used[1] ~= ARGV[2] then return {'key', ''} end
  if used[1] then return {'ok', used[2]} end
end
local record = redis.call('HMGET', KEYS[1], 'decision', 'evidence', 'score')
if not record[1] then return {'missing', ''} end
if record[3] and record[3] ~= ARGV[1] then return {'score', record[3]} end
if not record[3] then
  redis.call('HSET', KEYS[1], 'score', ARGV[1])
  if record[2] ~= '' then
    redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', 'evidence', record[2], 'score', ARGV[1])
  end
end
if ARGV[5] == '1' then
  redis.call('HSET', KEYS[3], 'body', ARGV[2], 'reply', record[1])
  redis.call('PEXPIRE', KEYS[3], ARGV[3])
end
return {'ok', record[1]}
"""


@dataclass(slots=True, frozen=True)
class Feedback:
    """A checked `POST /v1/outcomes`."""

    request_id: str
    score: float
    key: str | None


class Outcomes:
    """Decisions and outcomes of one router in the store. One a gateway process."""

    def __init__(self, store: Store, config: OutcomesConfig, router: str) -> None:
        self._store = store
        self._config = config
        self._router = router
        self.unrecorded = 0  # decisions that the store did not take

    async def record(self, request_id: str, model: str, run: Run) -> None:
        """Put an `auto` request's decision on record; where that fails, the answer goes without."""
        try:
            await self._record(request_id, model, run)
        except StoreUnavailable:
            self.unrecorded += 1
        except Exception:  # an answer must not fail for its record
            self.unrecorded += 1
            log.exception("the decision of request %s could not be recorded", request_id)

    async def _record(self, request_id: str, model: str, run: Run) -> None:
        plan, basis = run.plan, run.plan.basis
        if plan.decision is None and basis is None:
            return
        decision = {
            "object": "decision",
            "request_id": request_id,
            "created": round(time.time(), 3),
            "model": model,
            "expert": run.expert,
            "chosen": plan.order[0],
            "attempts": run.attempts,
            "cache": run.cache,
            "policy": plan.policy,
            "router": plan.router,
            "router_version": basis.version if basis else None,
            "confidence": plan.confidence,
            "explored": plan.explored,
            "propensity": plan.propensity,
            "predictions": _predictions(basis.predicted) if basis else None,
        }
        evidence = b""
        if basis is not None and run.expert in basis.shipped:
            quality, uncertainty = basis.shipped[run.expert]
            known = {"quality": quality, "uncertainty": uncertainty, "features": basis.features}
            evidence = orjson.dumps({"version": basis.version, "expert": run.expert, **known})
        limits = (_ms(self._config.ttl_s), self._config.max_pending)
        keys = [f"record:{request_id}", "records"]
        await self._store.script(_RECORD, keys, [orjson.dumps(decision), evidence, *limits])

    async def decision(self, request_id: str) -> dict[str, Any]:
        """The decision on record, with its outcome. Raises `InvalidRequest` (404) or `ExpertUnavailable` (503)."""
        try:
            found = await self._store.hgetall(f"record:{request_id}")
        except StoreUnavailable as error:
            raise _unavailable(error) from error
        if "decision" not in found:
            raise _missing(request_id)
        score = found.get("score")
        outcome = None if score is None else {"score": float(score)}
        return {**orjson.loads(found["decision"]), "outcome": outcome}

    async def post(self, feedback: Feedback) -> dict[str, Any]:
        """Take an outcome, once. Raises `InvalidRequest` (404, 409) or `ExpertUnavailable` (503)."""
        score = repr(feedback.score)
        body = hashlib.blake2b(orjson.dumps([feedback.request_id, score]), digest_size=16).hexdigest()
        digest = hashlib.blake2b((feedback.key or "").encode(), digest_size=16).hexdigest()
        keys = [f"record:{feedback.request_id}", f"outcomes:{self._router}", f"idempotency:{digest}"]
        limits = [_ms(self._config.ttl_s), self._config.log_length]
        try:
            verdict, said = await self._store.script(_OUTCOME, keys, [score, body, *limits, int(bool(feedback.key))])
        except StoreUnavailable as error:
            raise _unavailable(error) from error
        match verdict:
            case b"key":
                raise InvalidRequest(
                    "this Idempotency-Key was used with another body: send a new key with each new outcome",
                    param="Idempotency-Key",
                    code="idempotency_conflict",
                    status=409,
                )
            case b"score":
                raise InvalidRequest(
                    f"the request has the outcome {float(said):g} already, and an outcome is final: "
                    "send one outcome a request",
                    param="score",
                    code="outcome_conflict",
                    status=409,
                )
            case b"missing":
                raise _missing(feedback.request_id)
        expert = orjson.loads(said)["expert"]
        return {
            "object": "outcome",
            "request_id": feedback.request_id,
            "expert": expert,
            "score": feedback.score,
            "status": "accepted",
        }

    # -- the log -----------------------------------------------------------------------------------------------

    async def after(self, position: str, count: int, version: str) -> tuple[str, list[Outcome]]:
        """The next outcomes of decisions by this version of the router, and the position after them.

        The position is the same as before where there is nothing new. Raises `StoreUnavailable`.
        """
        entries = await self._store.entries(f"outcomes:{self._router}", position, count)
        outcomes = []
        for id, fields in entries:
            position = id
            try:
                known = orjson.loads(fields["evidence"])
                if known["version"] != version:
                    continue
                features = np.array(known["features"], dtype=np.float32)
                quality, uncertainty = float(known["quality"]), float(known["uncertainty"])
                outcomes.append(Outcome(str(known["expert"]), features, quality, uncertainty, float(fields["score"])))
            except (ValueError, KeyError, TypeError):
                log.warning("entry %s of the outcomes cannot be read; it is passed over", id)
        return position, outcomes

    async def snapshot(self, version: str) -> tuple[str, OnlineState] | None:
        """What was learned over this version, and up to which position. Raises `StoreUnavailable`."""
        found = await self._store.hgetall(f"learned:{self._router}:{version}")
        if not found:
            return None
        try:
            return found["position"].decode(), await asyncio.to_thread(OnlineState.loads, found["state"])
        except (ValueError, KeyError) as error:
            log.warning("what router %s had learned cannot be read (%s); the log is read anew", self._router, error)
            return None

    async def keep(self, position: str, state: OnlineState) -> None:
        """Store what was learned up to a position. Raises `StoreUnavailable`.

        Any gateway may: all of them write states of one log, and reading on from an older one leads to the newer.
        """
        data = await asyncio.to_thread(state.dumps)
        fields: dict[str, bytes | str | int | float] = {"position": position, "state": data}
        await self._store.hset(f"learned:{self._router}:{state.version}", fields, ttl_s=SNAPSHOT_TTL_S)


def parse_feedback(body: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> Feedback:
    """Check a body `{request_id, score}` and the header Idempotency-Key. Raises `InvalidRequest`."""
    for name in body:
        if name not in ("request_id", "score"):
            raise InvalidRequest(f"there is no key '{name[:64]}'; there are: request_id, score", param=name[:64])
    request_id, score = body.get("request_id"), body.get("score")
    if not isinstance(request_id, str) or not SANE_ID.fullmatch(request_id):
        raise InvalidRequest("'request_id' must be the x-request-id of an answer", param="request_id")
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise InvalidRequest(f"'score' must be a number from 0 to 1, not {kind_of(score)}", param="score")
    if not (math.isfinite(score) and 0 <= score <= 1):
        raise InvalidRequest(f"'score' must be from 0 to 1, not {score:g}", param="score")
    given = headers.get(b"idempotency-key")
    key = None if given is None else given.decode("latin-1").strip()
    if key is not None and not (0 < len(key) <= MAX_KEY and key.isprintable()):
        raise InvalidRequest(
            f"the header Idempotency-Key must have 1 to {MAX_KEY} printable characters", param="Idempotency-Key"
        )
    return Feedback(request_id, float(score) + 0.0, key)  # + 0.0: -0.0 and 0.0 are one score


def _predictions(predicted: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {name: {"quality": quality, "uncertainty": u} for name, (quality, u) in predicted.items()}


def _missing(request_id: str) -> InvalidRequest:
    return InvalidRequest(
        f"no decision is on record for '{request_id[:128]}': it has expired, or the request was not one for `auto`; "
        "send the x-request-id of the answer",
        param="request_id",
        code="decision_not_found",
        status=404,
    )


def _unavailable(error: StoreUnavailable) -> ExpertUnavailable:
    return ExpertUnavailable(f"{error}; try again later", code="store_unavailable")


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
