"""Sampling follows the distribution that the parameters describe."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from signalbox.experts import sampler
from signalbox.experts.base import SamplingParams
from signalbox.experts.sampler import SamplerRow, sample

CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def draws(count: int, logits: torch.Tensor = LOGITS, **params: object) -> Counter[int]:
    row = SamplerRow.of(SamplingParams(seed=1, **params), CPU)  # type: ignore[arg-type]
    return Counter(sample(logits[None], [row])[0].token_id for _ in range(count))


def expected(logits: torch.Tensor, keep: list[int]) -> dict[int, float]:
    p = logits[keep].softmax(0)
    return dict(zip(keep, p.tolist(), strict=True))


@pytest.mark.parametrize(
    ("params", "keep", "temperature"),
    [
        ({}, [0, 1, 2, 3, 4, 5], 1.0),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4, 5], 0.5),
        ({"top_k": 2}, [0, 1], 1.0),
        ({"top_p": 0.8}, [0, 1, 2], 1.0),  # .56, .21, .13: the third passes .8
        ({"top_k": 4, "top_p": 0.5}, [0], 1.0),
    ],
)
def test_frequencies(params: dict[str, object], keep: list[int], temperature: float) -> None:
    got = draws(4000, **params)
    want = expected(LOGITS / temperature, keep)
    assert set(got) <= set(keep)
    for token, p in want.items():
        assert got[token] / 4000 == pytest.approx(p, abs=0.03)


def test_nucleus_beyond_the_first_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "NUCLEUS_GUESS", 2)
    got = draws(4000, top_p=0.8)
    assert set(got) == {0, 1, 2}


def test_penalties_and_bias() -> None:
    row = SamplerRow.of(SamplingParams(temperature=0, frequency_penalty=0.6), CPU)
    seen = []
    for _ in range(4):
        token = sample(LOGITS[None], [row])[0].token_id
        row.counts[token] += 1
        seen.append(token)
    assert seen == [0, 0, 1, 0]  # 2.0, 1.4, then 1.0 beats .8, then .8 beats .4
    assert draws(5, temperature=0, logit_bias={5: 100.0}) == {5: 5}
    banned = draws(50, temperature=0, logit_bias={0: -100.0})
    assert banned == {1: 50}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63), st.floats(0.1, 2), st.floats(0.1, 1), st.integers(0, 10), st.integers(1, 4))
def test_a_row_does_not_depend_on_its_neighbours(
    seed: int, temperature: float, top_p: float, top_k: int, n: int
) -> None:
    params = SamplingParams(seed=seed, temperature=temperature, top_p=top_p, top_k=top_k)
    logits = torch.randn(n + 1, 50, generator=torch.Generator().manual_seed(seed % 1000))
    alone = sample(logits[:1], [SamplerRow.of(params, CPU)])[0]
    others = [SamplerRow.of(SamplingParams(temperature=1.0), CPU) for _ in range(n)]
    assert sample(logits, [SamplerRow.of(params, CPU), *others])[0] == alone


def test_bfloat16_logits_and_logprobs() -> None:
    row = SamplerRow.of(SamplingParams(temperature=0, logprobs=2), CPU)
    drawn = sample(LOGITS[None].bfloat16(), [row])[0]
    assert drawn.token_id == 0
    assert drawn.logprob == pytest.approx(float(LOGITS.log_softmax(0)[0]), abs=0.01)
    assert [token for token, _ in drawn.top] == [0, 1]
