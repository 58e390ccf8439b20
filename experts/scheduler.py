"""Which requests the next step computes: continuous admission for the transformers engine. No threads, no asyncio.

In the manner of nano-vllm: a queue, a list of running requests, and `step`, one packed forward pass that gives a
token to every decoding request and reads pieces of waiting prompts within `prefill_tokens`.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Sequence as Seq

import torch
import torch.nn.functional as F

from signalbox.experts.base import Chunk, ExpertError
from signalbox.experts.model_runner import ModelRunner
from signalbox.experts.packed_batch import PackedBatch, Segment
from signalbox.experts.sampler import sample
from signalbox.experts.sequence import Sequence

log = logging.getLogger(__name__)

# Logits of this many positions are held as float32 at once while scoring (64 x 262,144 x 4 B = 67 MB for Gemma).
SCORE_POSITIONS = 64

Result = tuple[Sequence, Chunk | ExpertError]


class Scheduler:
    """Rows, queue and steps of one engine; used by one thread, but `waiting` may be appended to by any."""

    def __init__(self, runner: ModelRunner, *, max_running: int, prefill_tokens: int, budget_tokens: int) -> None:
        self.runner = runner
        self.max_running, self.prefill_tokens, self.budget_tokens = max_running, prefill_tokens, budget_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the index is the row in the cache
        self._suspects: list[Sequence] = []

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.running or self.waiting)

    def step(self) -> list[Result]:
        """Drop the aborted, admit the waiting, compute once. Returns new chunks, and errors of failed requests.

        A step that fails costs one request at most: with several running, each is then computed alone until the
        guilty one has failed by itself; the others keep what they generated and have their cache computed again.
        """
        for sequence in [s for s in self.running if s.aborted]:
            self._leave(sequence)
        self._admit()
        if not self.running:
            return []
        active = [self.running.index(self._suspects[0])] if self._suspects else list(range(len(self.running)))
        try:
            results = self._compute(active)
        except Exception as error:
            log.exception("a step over %d requests failed", len(active))
            return self._isolate(active, error)
        if self._suspects and self._suspects[0].decoding:
            self._suspects.pop(0)
        for sequence, chunk in results:
            if isinstance(chunk, ExpertError) or chunk.finish_reason is not None:
                self._leave(sequence)
        return results

    def _admit(self) -> None:
        """Give free rows to waiting requests, first come first served, within the cache's memory."""
        while self.waiting and len(self.running) < self.max_running and not self._suspects:
            head = self.waiting[0]
            longest = max(s.most_tokens for s in (*self.running, head))
            if not head.aborted and self.running and (len(self.running) + 1) * longest > self.budget_tokens:
                break  # it waits for memory; nobody overtakes it
            self.waiting.popleft()
            if not head.aborted:
                self.running.append(head)

    def _compute(self, active: Seq[int]) -> list[Result]:
        order, batch, keep = self._pack(active)
        logits = self.runner.forward(batch, keep)
        with torch.inference_mode():
            drawn = sample(logits, [s.sampler for s in order])
        results: list[Result] = []
        for sequence, token in zip(order, drawn, strict=True):
            try:
                results.append((sequence, sequence.accept(token, self.runner.eos_token_ids, self.runner.token_text)))
            except Exception as error:
                log.exception("a token could not be turned into text")
                results.append((sequence, ExpertError(f"the answer could not be decoded: {error}")))
        return results

    def _pack(self, active: Seq[int]) -> tuple[list[Sequence], PackedBatch, list[int]]:
        """The step's tokens, the requests that get a token from it, and the positions of their logits."""
        decoding = [row for row in active if self.running[row].decoding]
        order = [self.running[row] for row in decoding]
        tokens = [s.tokens[-1] for s in order]
        positions = [s.computed for s in order]
        owners = list(decoding)
        keep = list(range(len(decoding)))
        for sequence in order:
            sequence.computed += 1
        decode_length = max((s.computed for s in order), default=0)

        segments: list[Segment] = []
        budget = self.prefill_tokens
        for row in active:
            s = self.running[row]
            count = min(s.pending, budget)
            if count == 0:  # decoding, or no budget left
                continue
            budget -= count
            segments.append(Segment(len(tokens), len(tokens) + count, row, s.computed))
            tokens += s.tokens[s.computed : s.computed + count]
            owners += [row] * count
            positions += range(s.computed, s.computed + count)
            s.computed += count
            if not s.pending:
                order.append(s)
                keep.append(len(tokens) - 1)

        runner = self.runner
        runner.cache.reserve(len(self.running), max(len(s.tokens) for s in self.running), self.budget_tokens)
        batch = PackedBatch(
            token_ids=runner.tensor(tokens),
            rows=runner.tensor(owners),
            positions=runner.tensor(positions),
            decode_rows=decoding,
            decode_length=decode_length,
            segments=segments,
            cache=runner.cache,
            slots=[self.running[row].slot for row in owners] if runner.lora else None,
        )
        return order, batch, keep

    def _leave(self, sequence: Sequence) -> None:
        """Free a row: the last row's request moves into it."""
        row = self.running.index(sequence)
        last = self.running.pop()
        if last is not sequence:
            self.runner.cache.move(len(self.running), row, last.computed)
            self.running[row] = last
        if sequence in self._suspects:
            self._suspects.remove(sequence)

    def _isolate(self, active: Seq[int], error: Exception) -> list[Result]:
        """Fail the request that a failed step was for, or put all that took part under suspicion."""
        if len(active) == 1:
            culprit = self.running[active[0]]
            self._leave(culprit)
            return [(culprit, ExpertError(f"the expert failed on this request: {type(error).__name__}: {error}"))]
        self._suspects = [self.running[row] for row in active]
        for sequence in self._suspects:
            sequence.computed = 0
        return []

    def score(self, texts: Seq[tuple[list[int], list[int], int]]) -> tuple[list[float], float]:
        """Negative log2-likelihoods of answers given prompts in one forward pass.

        texts: (prompt ids, answer ids, the adapter's slot or -1) each.

        Returns the bits of each answer and the seconds that the pass took.
        """
        started = time.perf_counter()
        tokens: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        keep: list[int] = []
        slots: list[int] = []
        for prompt, answer, slot in texts:
            start, count = len(tokens), len(prompt) + len(answer)
            tokens += [*prompt, *answer]
            positions += range(count)
            segments.append(Segment(start, start + count, 0, 0))
            keep += range(start + len(prompt) - 1, start + count - 1)
            slots += [slot] * count
        runner = self.runner
        ids = runner.tensor(tokens)
        batch = PackedBatch(ids, ids, runner.tensor(positions), [], 0, segments, None, slots)
        logits = runner.forward(batch, keep)
        answers = runner.tensor([token for _, answer, _ in texts for token in answer])
        with torch.inference_mode():
            nats = torch.cat(
                [
                    F.cross_entropy(rows.float(), ids, reduction="none")
                    for rows, ids in zip(logits.split(SCORE_POSITIONS), answers.split(SCORE_POSITIONS), strict=True)
                ]
            )
            bits = [float(part.sum()) / math.log(2) for part in nats.split([len(answer) for _, answer, _ in texts])]
        return bits, time.perf_counter() - started
