"""Intents: keywords before examples, whole words, the order of declaration; what an intent changes in a policy."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signalbox.experts.base import InvalidRequest
from signalbox.policies import intents
from signalbox.policies.base import Objective, Parallel, Policy, Slo
from signalbox.policies.intents import MAX_CHARACTERS, IntentCache, IntentMatcher, apply_intent

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "tasks"

SUPPORT = Policy.model_validate(
    {
        "slo": {"max_ttft_ms": 800},
        "objective": {"quality": 1.0, "cost": 2.0},
        "min_quality": 0.2,
        "allowed": ["small-*"],
        "denied": ["small-old"],
        "max_tokens": 100,
        "priority": 3,
        "intents": {
            "fraud": {
                "keywords": ["fraud", "stolen card", "c++ exploit", "Straße"],
                "slo": {"max_total_ms": 9000},
                "min_quality": 0.9,
                "allowed": ["*"],
                "max_tokens": 400,
                "parallel": {"samples": 5, "arbiter": "vote"},
            },
            "card": {
                "keywords": ["card"],
                "examples": ["I lost my card and need another", "my card has not arrived"],
            },
            "weather": {
                "examples": [
                    "what will the weather be like tomorrow",
                    "is it going to rain this afternoon",
                    "how hot is it outside today",
                ],
                "objective": {"quality": 0.0, "cost": 1.0},
            },
        },
    }
)


@pytest.fixture(scope="module")
def matcher() -> IntentMatcher:
    return IntentMatcher(SUPPORT)


@pytest.mark.parametrize(
    ("text", "intent"),
    [
        ("This is FRAUD!", "fraud"),
        ("a stolen   CARD", "fraud"),  # a phrase, over blanks, in any case
        ("a stolen\ncard", "fraud"),
        ("my card was stolen: a fraud", "fraud"),  # both have a keyword: the one declared first
        ("my card.", "card"),
        ("cards and discards, a cardigan", None),  # no partial words
        ("fraudulent", None),
        ("stolen bank card", "card"),  # not the phrase
        ("a C++ exploit was found", "fraud"),
        ("a c exploit was found", None),
        ("in der STRASSE", "fraud"),  # ß folds to ss
        ("in der Stra\u017fse", "fraud"),  # and so does the long s
        ("", None),
    ],
)
def test_keywords(matcher: IntentMatcher, text: str, intent: str | None) -> None:
    assert matcher.match(text) == intent


@pytest.mark.parametrize(
    ("keyword", "text", "found"),
    [
        ("退款", "我要退款，谢谢", True),  # no blanks between words: each character is one
        ("退款", "我要退谢款", False),
        ("ราคา", "ขอราคาหน่อย", True),
        ("क", "कि", False),  # a vowel sign belongs to its letter
        ("كتاب", "قرأت كتاب", True),
        ("don't", "I DON'T know", True),
        ("don't", "don t", False),
        ("24/7", "open 24/7?", True),
        ("7", "open 24/7?", True),
        ("4", "open 24/7?", False),
        ("e\u0301cole", "une \u00e9cole", True),  # composed and decomposed
        ("...", "wait ... what", True),
        ("   ", "anything at all", False),
    ],
)
def test_keywords_in_other_scripts_and_with_signs(keyword: str, text: str, found: bool) -> None:
    matcher = IntentMatcher(Policy.model_validate({"intents": {"it": {"keywords": [keyword]}}}))
    assert (matcher.match(text) == "it") is found


def test_examples_tell_where_no_keyword_does(matcher: IntentMatcher) -> None:
    assert matcher.match("will it rain tomorrow afternoon?") == "weather"
    assert matcher.match("Solve x^2 - 5x + 6 = 0 for x.") is None
    similarity = matcher.similarities("how hot is it outside today")
    assert set(similarity) == {"fraud", "card", "weather"}
    assert similarity["fraud"] == 0, "no examples"
    assert similarity["weather"] > 0.5 > similarity["card"] >= 0


def test_a_keyword_beats_examples(matcher: IntentMatcher) -> None:
    assert matcher.match("what will the weather be like tomorrow, and is this a fraud?") == "fraud"


def test_an_intent_of_one_example_recognises_it() -> None:
    matcher = IntentMatcher(Policy.model_validate({"intents": {"one": {"examples": ["please translate this"]}}}))
    assert matcher.similarities("Please translate THIS")["one"] == pytest.approx(1, abs=1e-6)
    assert matcher.match("please translate this") == "one"


def test_the_order_of_intents_does_not_matter_to_examples() -> None:
    turned = SUPPORT.model_copy(update={"intents": dict(reversed(SUPPORT.intents.items()))})
    text = "is it very hot outside"
    ours, theirs = IntentMatcher(SUPPORT).similarities(text), IntentMatcher(turned).similarities(text)
    assert ours == pytest.approx(theirs)


def test_only_the_beginning_is_read(matcher: IntentMatcher) -> None:
    assert matcher.match("x " * (MAX_CHARACTERS // 2 - 4) + " fraud") == "fraud"
    assert matcher.match("x " * (MAX_CHARACTERS // 2) + " fraud") is None


def test_a_policy_without_intents_or_with_empty_ones_matches_nothing() -> None:
    assert IntentMatcher(Policy()).match("anything") is None
    assert IntentMatcher(Policy.model_validate({"intents": {"asked": {"max_tokens": 5}}})).match("anything") is None
    assert IntentMatcher(Policy.model_validate({"intents": {"empty": {"examples": ["", " "]}}})).match("any") is None


@given(st.text(max_size=300) | st.text(alphabet="\u0000\ud800\ufdfa\u0300 .,(\U0001f642\u0e01fraud", max_size=60))
def test_no_text_breaks_it(text: str) -> None:
    assert IntentMatcher(SUPPORT).match(text) in (None, *SUPPORT.intents)


@given(st.lists(st.text(max_size=40), max_size=5), st.lists(st.text(max_size=60), max_size=5), st.text(max_size=100))
def test_no_keyword_or_example_breaks_it(keywords: list[str], examples: list[str], text: str) -> None:
    policy = Policy.model_validate({"intents": {"any": {"keywords": keywords, "examples": examples}}})
    matcher = IntentMatcher(policy)
    assert matcher.match(text) in (None, "any")
    assert all(-1e-6 <= value <= 1 + 1e-6 for value in matcher.similarities(text).values())


@given(st.sampled_from(["fraud", "stolen card"]), st.text(alphabet="abc ,.!\n", max_size=30))
def test_a_keyword_between_blanks_is_always_found(keyword: str, around: str) -> None:
    assert IntentMatcher(SUPPORT).match(f"{around} {keyword} {around}") == "fraud"


@given(st.text(alphabet="fraudx", min_size=1, max_size=8))
def test_a_keyword_inside_a_word_is_never_found(letters: str) -> None:
    policy = Policy.model_validate({"intents": {"fraud": {"keywords": ["fraud"]}}})
    assert (IntentMatcher(policy).match(letters) is not None) == (letters == "fraud")


def test_what_an_intent_gives_replaces_the_policys() -> None:
    policy = apply_intent(SUPPORT, "fraud")
    assert policy.slo == Slo(max_total_ms=9000), "the whole of it: no ceiling on the first token any more"
    assert (policy.min_quality, policy.allowed, policy.max_tokens) == (0.9, ("*",), 400)
    assert policy.parallel == Parallel(samples=5, arbiter="vote")
    assert policy.objective == SUPPORT.objective, "not given"
    assert (policy.denied, policy.priority) == (("small-old",), 3), "not an intent's to change"
    cheap = apply_intent(SUPPORT, "weather")
    assert cheap.objective == Objective(quality=0.0, cost=1.0) and cheap.slo == SUPPORT.slo
    assert apply_intent(SUPPORT, "card") == SUPPORT


def test_an_unknown_intent_is_the_requests_fault() -> None:
    with pytest.raises(InvalidRequest) as caught:
        apply_intent(SUPPORT, "poetry")
    assert caught.value.status == 400 and caught.value.param == "signalbox.intent"
    assert "fraud, card, weather" in caught.value.message
    with pytest.raises(InvalidRequest, match="it has none"):
        apply_intent(Policy(), "poetry")


def test_matchers_are_kept_by_identity_and_bounded() -> None:
    cache = IntentCache(size=2)
    policies = [Policy.model_validate({"intents": {"it": {"keywords": [f"word{i}"]}}}) for i in range(3)]
    first = cache.of(policies[0])
    assert cache.of(policies[0]) is first
    cache.of(policies[1])
    assert cache.of(policies[0]) is first, "used again: the other is older now"
    cache.of(policies[2])
    assert cache.of(policies[0]) is first and len(cache) == 2
    same = policies[0].model_copy()
    assert cache.of(same).match("word0") == "it", "equal, not the same object: made anew"
    assert len(cache) == 2


async def test_a_matcher_is_built_once_and_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    class Watched(IntentMatcher):
        def __init__(self, policy: Policy) -> None:
            threads.append(threading.get_ident())
            super().__init__(policy)

    monkeypatch.setattr(intents, "IntentMatcher", Watched)
    cache = IntentCache()
    first = asyncio.create_task(cache.ready(SUPPORT))
    await asyncio.sleep(0)
    first.cancel()  # whoever asked first may go away
    found = await asyncio.gather(*(cache.ready(SUPPORT) for _ in range(5)))
    assert all(matcher is found[0] for matcher in found) and len(cache) == 1
    assert cache.of(SUPPORT) is found[0] and await cache.ready(SUPPORT) is found[0]
    assert len(threads) == 1 and threads[0] != threading.get_ident()
    plain = Policy.model_validate({"intents": {"it": {"keywords": ["word"]}}})
    assert (await cache.ready(plain)).match("a word") == "it"
    assert threads[1:] == [threading.get_ident()], "nothing to wait for"


def test_calibration_on_real_intents() -> None:
    """The figures beside `THRESHOLD`, on fewer prompts: 16 intents of Banking77 and CLINC150, 16 examples each."""
    if not DATA.is_dir():
        pytest.skip(f"no real data in {DATA}")
    import numpy as np
    import pyarrow.parquet as pq

    rng = np.random.default_rng(7)
    texts: dict[str, dict[str, list[str]]] = {}
    for name in ("clinc150", "banking77"):
        table = pq.read_table(DATA / f"{name}.parquet").to_pydict()
        texts[name] = {}
        for text, intent in zip(table["text"], table["intent"], strict=True):
            if intent != "oos":
                texts[name].setdefault(intent, []).append(text)
    for name, other in (("clinc150", "banking77"), ("banking77", "clinc150")):
        examples, asked = {}, []
        for i, intent in enumerate(rng.choice(sorted(texts[name]), 16, replace=False)):
            drawn = [str(text) for text in rng.permutation(texts[name][intent])]
            examples[f"intent-{i}"] = {"examples": drawn[:16]}
            asked += [(f"intent-{i}", text) for text in drawn[16:24]]
        matcher = IntentMatcher(Policy.model_validate({"intents": examples}))
        found = [(intent, matcher.match(text)) for intent, text in asked]
        recognised = sum(said == intent for intent, said in found)
        answered = sum(said is not None for _, said in found)
        foreign = [str(rng.choice(texts[other][intent])) for intent in sorted(texts[other])]
        mistaken = sum(matcher.match(text) is not None for text in foreign)
        assert recognised >= 0.65 * len(found), (name, recognised / len(found))
        assert recognised >= 0.88 * answered, (name, recognised / answered)
        assert mistaken <= 0.1 * len(foreign), (name, mistaken / len(foreign))
