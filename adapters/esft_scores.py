"""Which routed experts does a task use? The relevance scores of ESFT, measured on a base model.

Source: Wang et al., "Let the Expert Stick to His Last" (ESFT, 2024), section 3. For expert i of layer l, over
N samples of L_j tokens, with g the gate value, 0 where the expert is not among the K chosen:

    average gate score      1/N sum_j 1/L_j sum_k g[i, k]
    token selection ratio   1/N sum_j 1/L_j sum_k 1[g[i, k] > 0] / K

The gate value is the weight that the expert's output is multiplied with, before a `routed_scaling_factor`. So where a
router renormalises its K weights (`norm_topk_prob`), a layer's gate scores sum to 1; where it does not, to the
probability that falls on the chosen. The token ratios of a layer sum to 1 in all families.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from signalbox.adapters.esft_format import layer_number
from signalbox.adapters.train_data import Encoded, TrainingError

# In transformers 5 these hand (hidden states, chosen ids, their weights) to one module of fused experts.
FAMILIES = ("deepseek_v2", "olmoe", "qwen3_moe")
FORMAT = "signalbox-esft-scores-1"
SAMPLES, LENGTH = 32, 4096  # of the paper: 2^17 tokens
MAX_FILE_BYTES = 64 << 20  # 512 experts in 100 layers have some 3 MB
_EXPERTS = re.compile(r"(?:.*\.)?layers\.(\d+)\.mlp\.experts")
_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")


@dataclass(slots=True, frozen=True)
class ExpertScores:
    """Relevance of every routed expert. gate, token: float64 [layers, experts]; `layers`: each row's layer number.

    `tokens` were read in `samples` samples; each chose `top_k` experts in every layer.
    """

    layers: tuple[int, ...]
    gate: Tensor
    token: Tensor
    top_k: int
    samples: int
    tokens: int


@dataclass(slots=True, frozen=True)
class ScoreFile:
    """Scores with what they were measured on. `fingerprint` names the content of the base; `data` says which rows."""

    scores: ExpertScores
    base: str
    fingerprint: str
    data: dict[str, Any]


def expert_layers(model: Any) -> dict[int, nn.Module]:
    """Layer number -> its module of routed experts: gate_up_proj [E, 2 I, H], down_proj [E, H, I], `act_fn`.

    Raises `TrainingError` for models without routed experts, and for families whose routers are not known here.
    """
    kind = getattr(model.config, "model_type", "?")
    found = {
        int(match[1]): module
        for name, module in model.named_modules()
        if (match := _EXPERTS.fullmatch(name)) and getattr(getattr(module, "gate_up_proj", None), "ndim", 0) == 3
    }
    if not found:
        raise TrainingError(
            f"a {kind} model has no routed experts; ESFT needs a mixture of experts ({', '.join(FAMILIES)}). "
            "For others there is LoRA: signalbox adapters train"
        )
    if kind not in FAMILIES:
        raise TrainingError(f"the router of {kind} models is not known; ESFT is for {', '.join(FAMILIES)}")
    return dict(sorted(found.items()))


def packed_samples(
    rows: Sequence[Encoded], count: int = SAMPLES, length: int = LENGTH, seed: int = 0
) -> list[list[int]]:
    """Rows, prompt and answer, in random order end to end, cut into at most `count` samples of `length` tokens.

    Where the rows are too few, what is left at the end is a sample of its own if it has half the length, or is all.
    Raises `TrainingError` where there is not a token.
    """
    if count < 1 or length < 1:
        raise TrainingError("scores need at least one sample of at least one token")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    samples: list[list[int]] = []
    current: list[int] = []
    for i in order:
        current += rows[i].prompt + rows[i].answer
        while len(current) >= length and len(samples) < count:
            samples.append(current[:length])
            current = current[length:]
        if len(samples) == count:
            return samples
    if current and (not samples or 2 * len(current) >= length):
        samples.append(current)
    if not samples:
        raise TrainingError("no rows to score the experts on; give a table with texts and answers")
    return samples


@torch.inference_mode()
def score_experts(
    model: Any, samples: Sequence[Sequence[int]], report: Callable[[int, int], None] = lambda done, total: None
) -> ExpertScores:
    """Run the base over samples of token ids and score its experts.

    Samples are read one by one: so none is padded, and a router sees only tokens of the task. `report` is called with
    samples done and in all. Raises `TrainingError` as `expert_layers` does, and where a score is not finite.
    """
    layers = expert_layers(model)
    if not samples:
        raise TrainingError("no samples to score the experts on")
    model.eval()
    with _recorded(model, layers) as picks:
        for done, sample in enumerate(samples, 1):
            picks.begin(len(sample))
            model(input_ids=torch.tensor([list(sample)], device=model.device), use_cache=False, logits_to_keep=1)
            report(done, len(samples))
    gate = torch.stack([picks.gate[layer] for layer in layers]).cpu() / len(samples)
    token = torch.stack([picks.token[layer] for layer in layers]).cpu() / len(samples)
    if not bool(torch.isfinite(gate).all()):
        raise TrainingError("a gate value of the base is not finite; are its weights whole?")
    return ExpertScores(tuple(layers), gate, token, picks.top_k, len(samples), sum(map(len, samples)))


class _Picks:
    """What the routers choose, added up: float64 [experts] of each layer."""

    def __init__(self, layers: Mapping[int, nn.Module], scale: float) -> None:
        self._scale, self._length, self.top_k = scale, 1, 0
        self.gate: dict[int, Tensor] = {}
        self.token: dict[int, Tensor] = {}
        for layer, module in layers.items():
            weight: Any = module.gate_up_proj
            self.gate[layer] = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
            self.token[layer] = torch.zeros_like(self.gate[layer])

    def begin(self, length: int) -> None:
        self._length = length

    def hook(self, layer: int) -> Callable[..., None]:
        def record(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = [*arguments, *(named[name] for name in _ARGUMENTS[len(arguments) :])]
            chosen, weights = given[1].flatten(), given[2].flatten().double() / self._scale
            self.top_k = int(given[1].shape[-1])
            self.gate[layer].scatter_add_(0, chosen, weights / self._length)
            self.token[layer].scatter_add_(0, chosen, (weights > 0).double() / (self._length * self.top_k))

        return record


@contextmanager
def _recorded(model: Any, layers: Mapping[int, nn.Module]) -> Iterator[_Picks]:
    scale = float(getattr(model.config, "routed_scaling_factor", 1.0) or 1.0)
    picks = _Picks(layers, scale)
    handles = [
        module.register_forward_pre_hook(picks.hook(layer), with_kwargs=True) for layer, module in layers.items()
    ]
    try:
        yield picks
    finally:
        for handle in handles:
            handle.remove()


# -- files -------------------------------------------------------------------------------------------------------


def write_scores(path: Path, file: ScoreFile) -> None:
    """Write scores as JSON, atomically: a layer's scores in a line of their own."""
    scores = file.scores
    head = {
        "format": FORMAT,
        "base": file.base,
        "fingerprint": file.fingerprint,
        "data": file.data,
        "samples": scores.samples,
        "tokens": scores.tokens,
        "top_k": scores.top_k,
    }
    lines = [
        f'    "{layer}": ' + json.dumps({"gate": gate, "token": token})
        for layer, gate, token in zip(scores.layers, scores.gate.tolist(), scores.token.tolist(), strict=True)
    ]
    text = json.dumps(head, indent=2).removesuffix("\n}") + ',\n  "layers": {\n' + ",\n".join(lines) + "\n  }\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.writing")
    partial.write_text(text)
    partial.replace(path)


def read_scores(path: Path) -> ScoreFile:
    """Read what `write_scores` wrote. Raises `TrainingError` that says what is wrong with the file."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise TrainingError(f"{path} is too large for a file of scores")
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise TrainingError(f"cannot read {path}: {error.strerror}; make it with: signalbox esft score") from None
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{path} is no JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise TrainingError(f"{path} is no file of expert scores ({FORMAT}); make one with: signalbox esft score")
    try:
        layers = {layer_number(layer): (found["gate"], found["token"]) for layer, found in raw["layers"].items()}
        order = sorted(layers)
        tables = [torch.tensor([layers[layer][part] for layer in order], dtype=torch.float64) for part in (0, 1)]
        scores = ExpertScores(
            tuple(order), tables[0], tables[1], int(raw["top_k"]), int(raw["samples"]), int(raw["tokens"])
        )
        file = ScoreFile(scores, str(raw["base"]), str(raw["fingerprint"]), dict(raw["data"]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TrainingError(f"{path} is damaged ({error!r}); make it again with: signalbox esft score") from None
    if any(table.ndim != 2 or not table.numel() for table in tables) or tables[0].shape != tables[1].shape:
        raise TrainingError(f"{path} is damaged: its layers have not the same experts")
    if not all(math.isfinite(value) and value >= 0 for table in tables for value in table.flatten().tolist()):
        raise TrainingError(f"{path} is damaged: a score is negative or not finite")
    return file
