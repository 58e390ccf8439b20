"""From logits to tokens, each row by its own sampling parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import torch
from torch import Tensor

from signalbox.experts.base import SamplingParams

# With top-p alone, the nucleus is first sought among this many tokens; sorting the whole vocabulary (262,144
# tokens with Gemma) for each row is the rare way out.
NUCLEUS_GUESS = 1024


@dataclass(slots=True)
class SamplerRow:
    """What the sampler keeps of one request: parameters, random state and counts of generated tokens."""

    params: SamplingParams
    generator: torch.Generator
    counts: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, params: SamplingParams, device: torch.device) -> SamplerRow:
        """A fresh row; without a seed the generator is seeded from the operating system."""
        generator = torch.Generator(device=device)
        if params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(params.seed & 0x7FFF_FFFF_FFFF_FFFF)
        return cls(params, generator)


@dataclass(slots=True, frozen=True)
class Sampled:
    """One drawn token; `top` lists (token id, log-probability) of the likeliest, best first."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, rows: Rows[SamplerRow]) -> list[Sampled]:
    """Draw one token for each row.

    logits: [B, V] in any float dtype. Log-probabilities are those of the model's own distribution, before
    temperature, penalties and truncation (as OpenAI and vLLM report them). A row's draw depends on its logits and
    its generator alone, never on its neighbours.
    """
    greedy = logits.argmax(dim=-1).tolist()
    drawn: list[Sampled] = []
    for i, row in enumerate(rows):
        params = row.params
        token = greedy[i]
        if params.logit_bias or params.presence_penalty or params.frequency_penalty or params.temperature > 0:
            token = _draw(_penalised(logits[i].float(), row), row)
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if params.logprobs is not None:
            logprobs = logits[i].float().log_softmax(dim=-1)
            logprob = float(logprobs[token])
            if params.logprobs:
                best = logprobs.topk(min(params.logprobs, logprobs.numel()))
                top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        drawn.append(Sampled(token, logprob, top))
    return drawn


def _penalised(logits: Tensor, row: SamplerRow) -> Tensor:
    """OpenAI's presence and frequency penalties and logit bias; `logits` [V] float32."""
    params = row.params
    if row.counts and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(list(row.counts), device=logits.device)
        times = torch.tensor(list(row.counts.values()), dtype=torch.float32, device=logits.device)
        logits = logits.clone()
        logits[ids] -= params.presence_penalty + params.frequency_penalty * times
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits = logits.clone()
        logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    return logits


def _draw(logits: Tensor, row: SamplerRow) -> int:
    """One token id from [V] float32 logits by temperature, top-k and top-p."""
    params = row.params
    if params.temperature <= 0:
        return int(logits.argmax())
    scaled = logits / params.temperature
    if params.top_k == 0 and params.top_p >= 1:
        return _race(scaled, row.generator)
    count = min(params.top_k or NUCLEUS_GUESS, scaled.numel())
    values, ids = scaled.topk(count)
    if params.top_p < 1:
        # After a top-k cut the nucleus is one of what is left; without, of the whole vocabulary.
        total = torch.logsumexp(values if params.top_k else scaled, dim=-1)
        mass = (values - total).exp().cumsum(dim=-1)
        if not params.top_k and float(mass[-1]) < params.top_p:
            values, ids = scaled.sort(descending=True)
            mass = (values - total).exp().cumsum(dim=-1)
        keep = int((mass < params.top_p).sum()) + 1
        values, ids = values[:keep], ids[:keep]
    return int(ids[_race(values, row.generator)])


def _race(logits: Tensor, generator: torch.Generator) -> int:
    """Sample an index from unnormalised log-probabilities: the exponential race, arg max of p_i / Exp(1)_i."""
    noise = torch.empty_like(logits).exponential_(generator=generator).clamp_min_(1e-20)
    return int((logits - noise.log()).argmax())
