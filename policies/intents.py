"""Which intent of a policy a request has: by keywords, or else by resemblance to examples. No model, well under 1 ms.

An intent maps a kind of request to service-level objectives and to system parameters (Iannelli et al., SLA Management
in Reconfigurable Multi-Agent RAG, arXiv 2412.06832; papers.md, section 8).
"""

from __future__ import annotations

import asyncio
import re
import unicodedata
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from signalbox.experts.base import InvalidRequest
from signalbox.policies.base import Intent, Policy
from signalbox.router.ngrams import BITS, FAMILIES, ngrams, to_bytes

MAX_CHARACTERS = 4096  # of a prompt, or of an example, that are looked at
NEIGHBOURS = 2  # examples of an intent that count: one alone may be near by chance
# A prompt that resembles no intent so much has none. Of CLINC150 and Banking77, with 5 and 16 intents of 16 examples:
# 74 to 80 % of an intent's other prompts are recognised, 94 to 98 % of them rightly; of prompts on other subjects 1 to
# 4 % are mistaken for an intent, of those near by (other intents of the same bank) 4 to 28 %. More examples help.
THRESHOLD = 0.25
MAX_CACHED = 256  # policies whose intents are kept ready

# Scripts written without blanks between words: each of their characters counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNSPACED += "\U00020000-\U0003ffff"
# Marks that belong to the word before them, which `\w` leaves out: Latin, Hebrew, Arabic, the scripts of India.
_MARKS = "\u0300-\u036f\u0591-\u05bd\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|(?:[^\W{_UNSPACED}]|[{_MARKS}])+|[^\s]")

_ROWS = 16  # bits for an example's number; a policy has 32 x 64 at most

Slots = NDArray[np.int64]
Weights = NDArray[np.float64]


class IntentMatcher:
    """Tells the intents of one policy apart.

    Keywords come first: whole words or phrases, in any case, signs counted as words; where several intents have one in
    the prompt, the one declared first. Then examples: the cosine of hashed words, pairs of words, and characters 3 to 5
    long inside words (`router/ngrams.py`), weighted by term frequency and by rarity among the examples; an intent's
    similarity is the mean over its two nearest examples. The most similar intent, if it is at least `threshold` so.
    """

    def __init__(self, policy: Policy, *, threshold: float = THRESHOLD) -> None:
        self._names = list(policy.intents)
        self._threshold = threshold
        # The first word of a phrase -> (place of its intent, the phrase between blanks).
        self._phrases: dict[str, list[tuple[int, str]]] = {}
        for place, intent in enumerate(policy.intents.values()):
            for keyword in intent.keywords:
                if tokens := _tokens(keyword):
                    self._phrases.setdefault(tokens[0], []).append((place, f" {' '.join(tokens)} "))
        examples = [intent.examples for intent in policy.intents.values()]
        self._examples = _ExampleIndex(examples) if any(examples) else None

    def match(self, text: str) -> str | None:
        """The name of the intent that a prompt has, or None. Reads the first 4,096 characters."""
        if not self._names:
            return None
        place = self._by_keyword(text)
        if place is None and self._examples is not None:
            similarity = self._examples.similarities(text)
            best = int(similarity.argmax())
            place = best if similarity[best] >= self._threshold else None
        return None if place is None else self._names[place]

    def similarities(self, text: str) -> dict[str, float]:
        """For each intent how much the prompt resembles its examples, in [0, 1]; 0 without examples."""
        values = self._examples.similarities(text) if self._examples is not None else np.zeros(len(self._names))
        return dict(zip(self._names, values.tolist(), strict=True))

    def _by_keyword(self, text: str) -> int | None:
        if not self._phrases:
            return None
        tokens = _tokens(text)
        padded = f" {' '.join(tokens)} "
        found = [
            place
            for first in self._phrases.keys() & set(tokens)
            for place, phrase in self._phrases[first]
            if phrase in padded
        ]
        return min(found, default=None)


class _ExampleIndex:
    """Examples as an inverted index: for each hash slot, ascending, the examples that hold it and its weight there.

    Each example has a cell of a grid, intents x the most examples of one (at least `NEIGHBOURS`).
    """

    def __init__(self, examples: list[tuple[str, ...]]) -> None:
        self._width = max(NEIGHBOURS, *map(len, examples))
        self._divisor = np.array([min(NEIGHBOURS, max(1, len(texts))) for texts in examples])
        cells = np.array([i * self._width + j for i, texts in enumerate(examples) for j in range(len(texts))])
        slots_of = [_slots(text) for texts in examples for text in texts]
        rows = np.repeat(np.arange(len(cells)), [slots.size for slots in slots_of])
        held, counts = np.unique((np.concatenate(slots_of) << _ROWS) + rows, return_counts=True)
        slots, rows = held >> _ROWS, held & ((1 << _ROWS) - 1)
        known, columns, frequency = np.unique(slots, return_inverse=True, return_counts=True)
        self._slots = np.r_[known, np.iinfo(np.int64).max]  # a search ends here at the latest
        # Inverse document frequency; the last is that of what no example holds.
        self._idf = np.log((1 + len(cells)) / (1.0 + np.r_[frequency, 0])) + 1
        self._values = _unit((1 + np.log(counts)) * self._idf[columns], rows * FAMILIES + (slots >> BITS))
        self._cells = cells[rows]
        self._starts = np.r_[0, np.cumsum(frequency)]

    def similarities(self, text: str) -> Weights:
        """For each intent the mean of its `NEIGHBOURS` greatest cosines, float64 [intents]; 0 without examples."""
        slots, counts = np.unique(_slots(text), return_counts=True)
        columns = np.searchsorted(self._slots, slots)
        columns = np.where(self._slots[columns] == slots, columns, -1)
        weights = _unit((1 + np.log(counts)) * self._idf[columns], slots >> BITS)
        known = columns >= 0
        columns, weights = columns[known], weights[known]
        if not columns.size:
            return np.zeros(self._divisor.size)
        starts = self._starts[columns]
        lengths = self._starts[columns + 1] - starts
        ends = np.cumsum(lengths)
        postings = np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)
        products = self._values[postings] * np.repeat(weights, lengths)
        cells = np.bincount(self._cells[postings], products, self._divisor.size * self._width)
        nearest = np.partition(cells.reshape(-1, self._width), -NEIGHBOURS, axis=1)[:, -NEIGHBOURS:]
        similarity: Weights = nearest.sum(axis=1) / self._divisor
        return similarity


def apply_intent(policy: Policy, name: str) -> Policy:
    """The policy for requests of an intent: what the intent gives in place of the policy's own.

    Raises `InvalidRequest` (`param` `signalbox.intent`) where the policy has no such intent.
    """
    intent = policy.intents.get(name)
    if intent is None:
        known = f"there are: {', '.join(policy.intents)}" if policy.intents else "it has none"
        raise InvalidRequest(f"the policy has no intent '{name[:64]}'; {known}", param="signalbox.intent")
    return policy.model_copy(update=_given(intent))


def _given(intent: Intent) -> dict[str, object]:
    fields = ("slo", "objective", "min_quality", "allowed", "max_tokens", "parallel")
    return {field: value for field in fields if (value := getattr(intent, field)) is not None}


class IntentCache:
    """Matchers of the policies in use, made when first asked for. Bounded; the one unused for longest goes first.

    For one event loop. Building takes some 0.2 ms an example: `ready` does it in a thread, `of` here and now.
    """

    def __init__(self, size: int = MAX_CACHED) -> None:
        self._size = size
        # By identity: the policy is kept beside its matcher, so that no other object can take its id.
        self._matchers: OrderedDict[int, tuple[Policy, IntentMatcher]] = OrderedDict()
        self._building: dict[int, asyncio.Task[IntentMatcher]] = {}

    def __len__(self) -> int:
        return len(self._matchers)

    def of(self, policy: Policy) -> IntentMatcher:
        """The matcher of this very policy object."""
        entry = self._matchers.get(id(policy))
        if entry is None:
            return self._keep(policy, IntentMatcher(policy))
        self._matchers.move_to_end(id(policy))
        return entry[1]

    async def ready(self, policy: Policy) -> IntentMatcher:
        """The same, without holding the event loop up."""
        if id(policy) in self._matchers or not any(intent.examples for intent in policy.intents.values()):
            return self.of(policy)
        task = self._building.get(id(policy))
        if task is None:
            task = self._building[id(policy)] = asyncio.create_task(asyncio.to_thread(IntentMatcher, policy))
            task.add_done_callback(lambda _: self._building.pop(id(policy), None))  # which keeps the policy till then
        matcher = await asyncio.shield(task)  # others may wait for it too
        return self.of(policy) if id(policy) in self._matchers else self._keep(policy, matcher)

    def _keep(self, policy: Policy, matcher: IntentMatcher) -> IntentMatcher:
        self._matchers[id(policy)] = (policy, matcher)
        if len(self._matchers) > self._size:
            self._matchers.popitem(last=False)
        return matcher


def _tokens(text: str) -> list[str]:
    """Words and signs, folded. Normalising can lengthen a text eighteenfold, hence the second bound."""
    folded = unicodedata.normalize("NFKC", text[:MAX_CHARACTERS].casefold())[: 2 * MAX_CHARACTERS]
    return _TOKEN.findall(folded)


def _slots(text: str) -> Slots:
    """Hash slots, with repeats, int64 in [0, FAMILIES << BITS): of words and their pairs, then of characters."""
    families = ngrams(to_bytes(text[:MAX_CHARACTERS].casefold()))
    return np.concatenate([slots + (family << BITS) for family, slots in enumerate(families)])


def _unit(weights: Weights, groups: Slots) -> Weights:
    """Scaled so that each group, one family of one text, has norm 1/sqrt(FAMILIES)."""
    norms = np.sqrt(FAMILIES * np.bincount(groups, weights * weights))
    return weights / norms[groups]
