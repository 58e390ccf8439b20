"""The live latency model: what a request's first token and each further one would take, learnt while serving.

Each replica of an expert fits one model to the requests that it serves and publishes its few numbers; gateways
predict from those alone. The features are those of a batch engine (continuous batching: Orca, OSDI 2022; prompts read
in pieces beside the decoding requests: Sarathi-Serve, OSDI 2024):

- a step takes a time that grows with the batch, so time per token = t0 + t1 (sqrt(b) - 1) + t2 (b - 1) + t3 context;
- the first token takes the steps under way, the prompts that are read before it and its own, and, where all places
  are taken, the time until enough requests have finished.

The batch that a request will see on average is its present one, drawn towards the usual one the longer the answer is:
in a queue with many servers the memory of the number present fades as exp(-t / mean stay) (M/G/infinity).

The coefficients are those of least squares on relative errors, none below 0 (so predictions are positive and grow
with load), with forgetting. Two things are added to plain recursive least squares: residuals are cut at what is usual
(Huber, 1964), so that one pause costs little; and the level as a whole follows faster than the shape, so that a wrong
declaration or a busier machine is learnt within a few requests.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import mul
from statistics import median
from typing import Any

from signalbox.experts.catalog import Latency as DeclaredLatency

WINDOW = 256  # requests over which the errors' medians are taken
FORGET = 0.99  # weight of what was known, at each request: the shape is that of the last hundred
LEVEL_GAIN = 1 / 16  # share of a residual by which the level follows, after the first requests
PRIOR = 2.0  # requests that the declared figures are worth
RIDGE = 0.01  # pull of each coefficient towards its prior, as a share of what is known of it
USUAL = 1 / 12  # share of the newest request in the usual batch and length
USUAL_GAIN, LEAST_USUAL = 0.2, 0.01  # how soon the usual size of a residual follows, and its least
CUT = 1.5  # residuals count up to this many times their usual size
TOKENS_UNIT = 100.0  # prompt tokens are counted in hundreds, which keeps the coefficients alike in size
CONTEXT_UNIT = 1000.0
LEAST_MS, MOST_MS = 1e-3, 1e8
MOST_TOKENS, MOST_REQUESTS = 1e8, 1e6
MOST_RESIDUAL = 7.0  # a thousandfold: what counts at most, of logarithms of ratios
MOST_SCALED = 1e6  # times the prediction that a feature counts at most; keeps the sums of squares finite
LEAST_SEEN = 1e-3  # sum of a feature's squared shares in the predictions, below which its prior stands
FULL_WEIGHT_TOKENS = 8.0  # time per token of a shorter answer counts less

TTFT_TERMS, TPOT_TERMS = 6, 4


@dataclass(slots=True, frozen=True)
class Load:
    """What a replica has to do when a request comes: requests in the batch, requests that wait for a place, and the
    prompt tokens of all of them that have no first token yet."""

    running: float = 0.0
    waiting: float = 0.0
    prompt_tokens_waiting: float = 0.0


@dataclass(slots=True, frozen=True)
class Latency:
    """Milliseconds to the first token and for each further token."""

    ttft_ms: float
    tpot_ms: float


@dataclass(slots=True, frozen=True)
class LatencyState:
    """A replica's model in plain numbers, fit for JSON; all that `predict` needs.

    `ttft` and `tpot` are coefficients (ms), `others` the usual number of other requests in the batch, `answer_tokens`
    the usual length of an answer, `max_running` the number of places (None: not known). The errors are medians of the
    relative error over the last 256 requests, None before the first, and the counts how many there were in all.
    """

    ttft: tuple[float, ...]
    tpot: tuple[float, ...]
    others: float = 0.0
    answer_tokens: float = 64.0
    max_running: int | None = None
    ttft_error: float | None = None
    tpot_error: float | None = None
    ttft_count: int = 0
    tpot_count: int = 0

    @classmethod
    def of(cls, fields: Any) -> LatencyState | None:
        """From what JSON made of a state; None where it is none of this version's (then the declared figures stand)."""
        if not isinstance(fields, Mapping):
            return None
        try:
            ttft, tpot = tuple(map(float, fields["ttft"])), tuple(map(float, fields["tpot"]))
            others, answer = float(fields.get("others", 0.0)), float(fields.get("answer_tokens", 64.0))
            places = fields.get("max_running")
            errors = [None if e is None else float(e) for e in (fields.get("ttft_error"), fields.get("tpot_error"))]
            counts = [int(fields.get(name, 0)) for name in ("ttft_count", "tpot_count")]
            numbers = [*ttft, *tpot, others, answer, *(e for e in errors if e is not None), *counts]
            if places is not None:
                places = int(places)
                numbers.append(places - 1)
        except (TypeError, ValueError, KeyError, OverflowError):
            return None
        if (len(ttft), len(tpot)) != (TTFT_TERMS, TPOT_TERMS) or not all(0 <= n < math.inf for n in numbers):
            return None
        return cls(ttft, tpot, others, answer, places, errors[0], errors[1], counts[0], counts[1])


def predict(
    state: LatencyState | None,
    declared: Latency | DeclaredLatency,
    load: Load,
    prompt_tokens: float,
    answer_tokens: float,
) -> Latency:
    """What a request would see that came now. Finite and positive; never less with more load.

    Args:
        state: the replica's; None: it has not said anything yet, then `declared` is what is known.
        declared: the configuration's figures, ms.
        load: the replica's, without this request.
        prompt_tokens: of this request.
        answer_tokens: predicted for this request.
    """
    if state is None:
        state = initial(declared)
    ttft_terms, tpot_terms = _terms(state, load, prompt_tokens, answer_tokens)
    return Latency(_dot(state.ttft, ttft_terms), _dot(state.tpot, tpot_terms))


def initial(declared: Latency | DeclaredLatency, max_running: int | None = None) -> LatencyState:
    """The model before the first request: the declared figures, and as much of waiting as follows from them."""
    ttft, tpot = _bounded(declared.ttft_ms), _bounded(declared.tpot_ms)
    steps = min(1.0, ttft / tpot)
    return LatencyState(
        (ttft - steps * tpot, steps, 0.0, 0.0, 0.0, 1.0), (tpot, 0.0, 0.0, 0.0), max_running=max_running
    )


class LatencyModel:
    """One replica's model: `predict` when a request comes, `observe` what came of it, `state` for others to predict.

    `max_running` is the number of places in the batch, None where there is no such bound.
    """

    def __init__(self, declared: Latency | DeclaredLatency, max_running: int | None = None) -> None:
        start = initial(declared, max_running)
        self._declared, self._max_running = declared, max_running
        self._ttft = _Fit(start.ttft, _idle_ttft(start), fixed=(None, 1.0, 0.0, 0.0, 0.0, 1.0))
        self._tpot = _Fit(start.tpot, (1.0, 0.0, 0.0, 0.0), fixed=(None, 0.0, 0.0, 0.0))
        self._others = start.others
        self._answer_tokens = start.answer_tokens
        self._ttft_errors, self._tpot_errors = _Errors(), _Errors()

    def predict(self, load: Load, prompt_tokens: float, answer_tokens: float | None = None) -> Latency:
        """As the function `predict`, by what is known now; `answer_tokens` None: an answer of usual length."""
        answer = self._answer_tokens if answer_tokens is None else answer_tokens
        return predict(self._now(), self._declared, load, prompt_tokens, answer)

    def observe(
        self,
        load: Load,
        prompt_tokens: float,
        answer_tokens: float,
        ttft_ms: float,
        tpot_ms: float | None = None,
        mean_running: float | None = None,
        predicted: Latency | None = None,
    ) -> None:
        """A whole request: `observe_ttft`, and `observe_tpot` where it had a second token."""
        predicted = predicted or self.predict(load, prompt_tokens, answer_tokens)
        self.observe_ttft(load, prompt_tokens, ttft_ms, predicted)
        if tpot_ms is not None:
            running = load.running + 1 if mean_running is None else mean_running
            self.observe_tpot(prompt_tokens, answer_tokens, running, tpot_ms, predicted)

    def observe_ttft(self, load: Load, prompt_tokens: float, ttft_ms: float, predicted: Latency | None = None) -> None:
        """A first token has come. Impossible times are passed over.

        Args:
            load: as it was when the request came, without it.
            prompt_tokens: of the request.
            ttft_ms: from its coming to its first token.
            predicted: what was predicted when it came, for the error; None: what would be predicted now.
        """
        if not LEAST_MS <= ttft_ms <= MOST_MS:
            return
        terms, _ = _terms(self._now(), load, prompt_tokens, self._answer_tokens)
        said = predicted.ttft_ms if predicted is not None else _dot(self._ttft.coefficients, terms)
        self._ttft_errors.note(said, ttft_ms)
        self._ttft.observe(terms, ttft_ms, 1.0)

    def observe_tpot(
        self,
        prompt_tokens: float,
        answer_tokens: float,
        mean_running: float,
        tpot_ms: float,
        predicted: Latency | None = None,
    ) -> None:
        """An answer of at least two tokens has ended. Impossible times are passed over.

        Args:
            prompt_tokens: of the request.
            answer_tokens: that it generated.
            mean_running: requests in the batch, this one included, on average from its first token to its last.
            tpot_ms: time per token after the first.
            predicted: what was predicted when it came, for the error; None: what would be predicted now for this batch.
        """
        if not LEAST_MS <= tpot_ms <= MOST_MS:
            return
        answer = _clipped(answer_tokens, MOST_TOKENS)
        batch = max(1.0, _clipped(mean_running, MOST_REQUESTS))
        terms = _tpot_terms(batch, _clipped(prompt_tokens, MOST_TOKENS), answer)
        said = predicted.tpot_ms if predicted is not None else _dot(self._tpot.coefficients, terms)
        self._tpot_errors.note(said, tpot_ms)
        self._tpot.observe(terms, tpot_ms, min(1.0, answer / FULL_WEIGHT_TOKENS))
        share = max(USUAL, 1.0 / (self._tpot_errors.count + 1))
        self._others += share * (batch - 1.0 - self._others)
        self._answer_tokens = max(1.0, self._answer_tokens + share * (answer - self._answer_tokens))

    def state(self) -> LatencyState:
        """For publication, errors included."""
        (ttft_error, tpot_error), counts = self.errors(), (self._ttft_errors.count, self._tpot_errors.count)
        return replace(
            self._now(), ttft_error=ttft_error, tpot_error=tpot_error, ttft_count=counts[0], tpot_count=counts[1]
        )

    def errors(self) -> tuple[float | None, float | None]:
        """Median relative errors of TTFT and of time per token over the last 256 requests; None before the first."""
        return self._ttft_errors.median, self._tpot_errors.median

    @property
    def usual_answer_tokens(self) -> float:
        """Tokens of an answer, a mean over recent ones."""
        return self._answer_tokens

    def _now(self) -> LatencyState:
        ttft, tpot = tuple(self._ttft.coefficients), tuple(self._tpot.coefficients)
        return LatencyState(ttft, tpot, self._others, self._answer_tokens, self._max_running)


def _terms(
    state: LatencyState, load: Load, prompt_tokens: float, answer_tokens: float
) -> tuple[list[float], list[float]]:
    """The features of both predictions, by the state's time per token and what it says is usual.

    TTFT: 1, a step, hundreds of prompt tokens, hundreds ahead, the steps in which both are read, the wait for a place.
    """
    prompt = _clipped(prompt_tokens, MOST_TOKENS)
    answer = max(1.0, _clipped(answer_tokens, MOST_TOKENS))
    running, waiting = _clipped(load.running, MOST_REQUESTS), _clipped(load.waiting, MOST_REQUESTS)
    ahead = _clipped(load.prompt_tokens_waiting, MOST_TOKENS) / TOKENS_UNIT
    places = state.max_running
    others, queued = running + waiting, 0.0
    if places is not None and others >= places:
        queued, others = others + 1 - places, places - 1.0
    t0, t1, t2, _ = state.tpot
    step = t0 + t1 * (math.sqrt(others + 1) - 1) + t2 * others
    wait = queued * state.answer_tokens * step / (others + 1) if queued else 0.0
    own = prompt / TOKENS_UNIT
    ttft = [1.0, step, own, ahead, (own + ahead) * step, wait]

    usual = state.others if places is None else min(state.others, places - 1.0)
    stays = answer / max(1.0, state.answer_tokens)  # in units of the mean stay
    kept = -math.expm1(-stays) / stays
    batch = 1.0 + usual + kept * (others - usual)
    return ttft, _tpot_terms(batch, prompt, answer)


def _tpot_terms(batch: float, prompt_tokens: float, answer_tokens: float) -> list[float]:
    return [1.0, math.sqrt(batch) - 1.0, batch - 1.0, (prompt_tokens + answer_tokens / 2) / CONTEXT_UNIT]


def _idle_ttft(state: LatencyState) -> list[float]:
    return [1.0, state.tpot[0], 0.0, 0.0, 0.0, 0.0]


def _dot(coefficients: Sequence[float], terms: Sequence[float]) -> float:
    return _bounded(sum(map(mul, coefficients, terms)))


def _bounded(ms: float) -> float:
    return min(max(ms, LEAST_MS), MOST_MS)


def _clipped(value: float, most: float) -> float:
    """Between 0 and `most`; 0 for what is no number."""
    return min(value, most) if value > 0 else 0.0


class _Errors:
    """Relative errors of the last requests, and how many there were in all."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self.count = 0

    def note(self, predicted: float, actual: float) -> None:
        self._recent.append(abs(predicted - actual) / actual)
        self.count += 1

    @property
    def median(self) -> float | None:
        return median(self._recent) if self._recent else None


class _Fit:
    """Least squares on relative errors with coefficients of at least 0, one observation at a time.

    `fixed` has the value towards which each coefficient is drawn while little is known of it; None: none.
    """

    def __init__(self, start: Sequence[float], terms: Sequence[float], fixed: Sequence[float | None]) -> None:
        self.coefficients = list(start)
        self._fixed = fixed
        self._count = 0
        self._usual = 1.0  # size of a residual, as the logarithm of a ratio
        # Normal equations, each observation divided by its prediction: the declared figures are the first ones.
        said = _dot(start, terms)
        scaled = [term / said for term in terms]
        self._gram = [[PRIOR * a * b for b in scaled] for a in scaled]
        self._right = [PRIOR * a for a in scaled]

    def observe(self, terms: Sequence[float], actual: float, weight: float) -> None:
        """Take an observation of weight in (0, 1] into account."""
        said = _dot(self.coefficients, terms)
        residual = min(max(math.log(actual / said), -MOST_RESIDUAL), MOST_RESIDUAL)
        self._usual += USUAL_GAIN * (min(abs(residual), 3 * self._usual) - self._usual)
        self._usual = max(self._usual, LEAST_USUAL)
        cut = CUT * self._usual
        residual = min(max(residual, -cut), cut)
        self._count += 1
        step = weight * residual * max(LEVEL_GAIN, 1.0 / (self._count + PRIOR))
        # All that was seen before is taken to have been seen at the new level.
        level = math.exp(step)
        said *= level
        aim = math.exp(residual - step)
        old, old_right = FORGET / (level * level), FORGET / level
        scaled = [min(term / said, MOST_SCALED) for term in terms]
        values, right = self.coefficients, self._right
        for i, (a, row) in enumerate(zip(scaled, self._gram, strict=True)):
            values[i] *= level
            a *= weight
            for j, b in enumerate(scaled):
                row[j] = row[j] * old + a * b
            right[i] = right[i] * old_right + a * aim
        self._solve()

    def _solve(self) -> None:
        """One round of coordinate descent from where the last one ended (Franc et al., 2005, for the bound at 0)."""
        values = self.coefficients
        for i, (row, fixed) in enumerate(zip(self._gram, self._fixed, strict=True)):
            own = row[i]
            if own < 1e-12:  # nothing is known of it
                if fixed is not None:
                    values[i] = fixed
                continue
            rest = self._right[i] - sum(map(mul, row, values)) + own * values[i]
            if fixed is None:
                values[i] = _clipped(rest / own, MOST_MS)
            else:
                pull = RIDGE * own + (LEAST_SEEN if fixed else 0.0)
                values[i] = _clipped((rest + pull * fixed) / (own + pull), MOST_MS)
