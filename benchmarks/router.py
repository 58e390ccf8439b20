"""Routers on ../shared/data/routing by 5-fold cross-validation, beside the lines they are held against.

Run by `make bench-router`; some 40 minutes on 2 cores. Predictions of a fold are kept in .run/bench_router under a hash
of table, pool, kind and the code of router/, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.report import ROOT, Row, print_table, write_results
from signalbox.router import metrics
from signalbox.router.artifact import predictor_class
from signalbox.router.base import Prediction, Prompt
from signalbox.router.cascade import CascadePredictor
from signalbox.router.crossvalidate import FOLDS, folds_of, lines_of_folds, parts_of
from signalbox.router.encoder import Encoder, load_encoder
from signalbox.router.evaluate import one_thread
from signalbox.router.judge import Evaluation, Lines, judge
from signalbox.router.metrics import standard_error, taken
from signalbox.router.online import Learning
from signalbox.router.replay import Poisoning, replay
from signalbox.router.table import Table, read_table, write_table

DATA = ROOT.parent / "shared" / "data" / "routing"
CACHE = ROOT / ".run" / "bench_router"
PEERS8 = [
    "Meta-Llama-3_1-8B-Instruct",
    "Mixtral-8x7B-Instruct-v0.1",
    "mathstral-7B",
    "Phi-3-mini-4k-instruct",
    "c4ai-command-r-v01",
    "Yi-34B",
    "gemma-7b",
    "Meta-Llama-3_1-8B",
]
API11 = [
    "gpt-4o-2024-05-13",
    "gemini-1.5-pro-002",
    "gemini-1.5-flash-002",
    "Meta-Llama-3_1-70B-Instruct",
    "Meta-Llama-3_1-8B-Instruct",
    "jamba-1.5-large",
    "Qwen1.5-72B-Chat",
    "Mixtral-8x7B-Instruct-v0.1",
    "c4ai-command-r-v01",
    "mathstral-7B",
    "Phi-3-mini-4k-instruct",
]
PAIR = ("gemini-1.5-flash-002", "gpt-4o-2024-05-13")
SIZES = {"Phi-3-mini-4k-instruct": 3.8e9, "c4ai-command-r-v01": 35e9, "Mixtral-8x7B-Instruct-v0.1": 46.7e9}
# One fit of the cascade gives `lexical` and `stacked` too.
CASCADE = ("lexical", "stacked", "cascade")
KINDS = ("cascade", "composition", "knn", "irt", "skills", "linear", "glider")
# Files of router/ that do not bear on predictions.
BESIDES = {"artifact", "collect", "compare", "crossvalidate", "evaluate", "judge", "kinds", "metrics"} | {
    *("online", "plots", "replay", "report_html", "robustness", "texts", "train")
}
DECISIONS = 300
RESAMPLES = 200
console = Console(stderr=True)


def main(
    only: Annotated[
        str, typer.Option(help="cases to run, comma-separated: peers8,api11,routellm,speed,coe,endtoend,online")
    ] = "",
    out: Annotated[str, typer.Option(help="name of the result file")] = "router",
) -> None:
    """Measure, print, write benchmarks/results/NAME.json."""
    if not DATA.is_dir():
        console.print(f"error: {DATA} is absent; the tables are read from there", style="red")
        raise typer.Exit(2)
    encoder = load_encoder()
    cases = {
        "peers8": lambda: peers8(encoder),
        "api11": lambda: api11(encoder),
        "routellm": lambda: routellm(encoder),
        "speed": lambda: speed(encoder),
        "coe": lambda: composition(encoder),
        "endtoend": end_to_end,
        "online": online,
    }
    rows: list[Row] = []
    for name in only.split(",") if only else list(cases):
        started = time.perf_counter()
        console.print(f"[bold]{name}[/bold]")
        rows += cases[name]()
        console.print(f"{name}: {time.perf_counter() - started:.0f} s")
    print_table(rows)
    path = write_results(out, f"python -m benchmarks.router {' '.join(sys.argv[1:])}".strip(), rows)
    console.print(f"wrote {path}")


# Quality, cost, pairs


def peers8(encoder: Encoder) -> list[Row]:
    """Level experts: mean quality decides."""
    table = read_table(DATA / "mmlu_pro.parquet").pool(PEERS8)
    case = "mmlu_pro peers8"
    predictions, lines = cross_validated(table, encoder, (*KINDS, "tryage"))
    rows = _references(case, judge(table, predictions["lexical"], lines))
    for kind, prediction in predictions.items():
        found = judge(table, prediction, lines)
        bound = 1.96 * found.quality_se
        best = kind == "cascade"
        rows.append(
            Row(
                case,
                f"mean quality, {kind}",
                found.quality,
                "share correct",
                found.quality - bound,
                found.quality + bound,
                reference=found.best_single,
                goal="at least .495 (of a sample whose best single is .440)" if best else None,
                met=found.quality >= 0.495 if best else None,
            )
        )
        rows += _gain(case, kind, found)
        rows.append(
            Row(case, f"uncertainty, rms of residual / deviation, {kind}", found.calibration["z_rms"], "", reference=1)
        )
    rows += _against(case, table, predictions, lines, "cascade")
    return rows


def api11(encoder: Encoder) -> list[Row]:
    """Quality against cost, and the pair gemini-1.5-flash to gpt-4o within the same pool."""
    table = read_table(DATA / "mmlu_pro.parquet").pool(API11)
    case = "mmlu_pro api11"
    predictions, lines = cross_validated(table, encoder, ("lexical", "composition", "knn", "linear"))
    first = judge(table, predictions["lexical"], lines, pair=PAIR)
    rows = _references(case, first)
    assert first.aiq_hull is not None
    rows.append(Row(case, "AIQ, single experts' hull", first.aiq_hull))
    rows += _told(case, table, lines)
    for kind, prediction in predictions.items():
        found = judge(table, prediction, lines, pair=PAIR)
        assert found.aiq is not None and found.apgr is not None
        best = kind == "lexical"
        low, high = _interval(lambda keep, p=prediction: _aiq(table, p, lines, keep), len(table))
        rows.append(
            Row(
                case,
                f"AIQ, {kind}",
                found.aiq,
                "",
                low,
                high,
                reference=found.aiq_hull,
                goal="at least .735 (of a sample whose hull is .707)" if best else None,
                met=found.aiq >= 0.735 if best else None,
            )
        )
        low, high = _interval(lambda keep, p=prediction: _apgr(table, p, PAIR, keep), len(table))
        rows.append(
            Row(
                "mmlu_pro gemini-1.5-flash to gpt-4o",
                f"APGR, {kind}",
                found.apgr,
                "",
                low,
                high,
                reference=0.5,
                goal="at least .68" if best else None,
                met=found.apgr >= 0.68 if best else None,
            )
        )
        rows += _cpt("mmlu_pro gemini-1.5-flash to gpt-4o", kind, found)
    found = judge(table, predictions["lexical"], lines)
    for point in found.collapse or []:
        rows.append(
            Row(
                f"collapse, {case}, lexical",
                f"share of the most chosen ({point['most_chosen']}) at a budget of {point['budget']:.2e} USD",
                point["share"],
                "share of prompts",
            )
        )
    return rows


def routellm(encoder: Encoder) -> list[Row]:
    """Mixtral-8x7B to GPT-4 on MMLU and GSM8K."""
    table = read_table(DATA / "routellm_pair.parquet").complete()
    means = table.score.mean(axis=0)
    weak, strong = (table.models[i] for i in np.argsort(means))
    case = "routellm_pair"
    predictions, lines = cross_validated(table, encoder, ("lexical", "linear"))
    rows = []
    for kind, prediction in predictions.items():
        found = judge(table, prediction, lines, pair=(weak, strong))
        assert found.apgr is not None
        best = kind == "lexical"
        low, high = _interval(lambda keep, p=prediction: _apgr(table, p, (weak, strong), keep), len(table))
        goal = "at least .66" if best else None
        rows.append(
            Row(case, f"APGR, {kind}", found.apgr, "", low, high, 0.5, goal, found.apgr >= 0.66 if best else None)
        )
        rows += _cpt(case, kind, found)
    return rows


def _cpt(case: str, kind: str, found: Evaluation) -> list[Row]:
    assert found.cpt50 is not None and found.cpt80 is not None
    return [
        Row(case, f"CPT(50 %), {kind}", found.cpt50, "share of calls", reference=0.5),
        Row(case, f"CPT(80 %), {kind}", found.cpt80, "share of calls", reference=0.8),
    ]


def _gain(case: str, kind: str, found: Evaluation) -> list[Row]:
    bound = 1.96 * found.gain_se
    return [
        Row(case, f"gain over best single, {kind}", found.gain, "", found.gain - bound, found.gain + bound, 0.0),
        Row(
            case, f"optimal selection, {kind}", found.optimal_selection, "", reference=found.majority_optimal_selection
        ),
        Row(case, f"regret, {kind}", found.regret),
    ]


def _references(case: str, found: Evaluation) -> list[Row]:
    values = {
        f"best single ({found.best_single_expert})": found.best_single,
        "majority": found.majority,
        "cheapest": found.cheapest,
        "random": found.random,
        "plain kNN, tuned": found.knn,
        "told the subject": found.told_task,
        "oracle": found.oracle,
    }
    return [Row(case, f"mean quality, {name}", value) for name, value in values.items() if value is not None]


def _told(case: str, table: Table, lines: Lines) -> list[Row]:
    """AIQ of a router that is told the subject and knows each expert's mean on it, from the other folds."""
    folds, tasks = folds_of(table), np.array(table.task)
    quality = np.empty_like(table.score, dtype=np.float32)
    for fold in np.unique(folds):
        for task in np.unique(tasks):
            known = table.score[(folds != fold) & (tasks == task)]
            quality[(folds == fold) & (tasks == task)] = known.mean(axis=0)
    prediction = Prediction(table.models, quality, np.ones_like(quality), 1.0)
    found = judge(table, prediction, lines, pair=PAIR)
    assert found.aiq is not None and found.apgr is not None
    return [
        Row(case, "AIQ, told the subject", found.aiq),
        Row("mmlu_pro gemini-1.5-flash to gpt-4o", "APGR, told the subject", found.apgr),
    ]


def _against(case: str, table: Table, predictions: dict[str, Prediction], lines: Lines, kind: str) -> list[Row]:
    """Paired differences of one kind to the others and to the reference lines."""
    mine = taken(table.score, predictions[kind].quality.argmax(axis=1))
    others = {k: taken(table.score, p.quality.argmax(axis=1)) for k, p in predictions.items() if k != kind}
    named = {"plain kNN": lines.knn, "told the subject": lines.told_task}
    rows = []
    for name, got in (*others.items(), *((n, g) for n, g in named.items() if g is not None)):
        difference = mine - got
        mean, bound = float(difference.mean()), 1.96 * standard_error(difference)
        slow = name == "stacked"
        rows.append(
            Row(
                case,
                f"{kind} less {name}, paired",
                mean,
                "",
                mean - bound,
                mean + bound,
                0.0,
                "within .005 of the slow predictor" if slow else None,
                abs(mean) <= 0.005 if slow else None,
            )
        )
    return rows


def _aiq(table: Table, prediction: Prediction, lines: Lines, keep: NDArray[Any]) -> float:
    cost = table.measures["cost"][keep]
    assert lines.expected_cost is not None
    curve = metrics.cost_quality_curve(prediction.quality[keep], lines.expected_cost[keep], table.score[keep], cost)
    return metrics.aiq(curve, cost)


def _apgr(table: Table, prediction: Prediction, pair: tuple[str, str], keep: NDArray[Any]) -> float:
    weak, strong = (table.models.index(name) for name in pair)
    scores, quality = table.score[keep], prediction.quality[keep].astype(np.float64)
    margin = quality[:, strong] - quality[:, weak]
    return metrics.apgr(metrics.performance_gap_recovered(margin, scores[:, weak], scores[:, strong]))


def _interval(value: Any, count: int) -> tuple[float, float]:
    """95 % of bootstrap resamples of the prompts."""
    rng = np.random.default_rng(0)
    draws = [value(rng.integers(count, size=count)) for _ in range(RESAMPLES)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


# Cross-validation that goes on where it was stopped


def cross_validated(table: Table, encoder: Encoder, kinds: Sequence[str]) -> tuple[dict[str, Prediction], Lines]:
    """Predictions of each kind for every row, by routers that have not seen it, and the reference lines."""
    folds = folds_of(table, FOLDS)
    encoder.reserve(len(table))
    out = {}
    for kind in kinds:
        names = CASCADE if kind == "cascade" else (kind,)
        parts = [_fold(table, folds, fold, encoder, kind) for fold in range(FOLDS)]
        for name in names:
            quality = np.empty(table.score.shape, dtype=np.float32)
            uncertainty = np.empty_like(quality)
            for fold, part in enumerate(parts):
                quality[folds == fold], uncertainty[folds == fold] = (
                    part[f"{name}.quality"],
                    part[f"{name}.uncertainty"],
                )
            out[name] = Prediction(table.models, quality, uncertainty, 1.0)
    return out, lines_of_folds(table, encoder, folds)


def _fold(table: Table, folds: NDArray[np.intp], fold: int, encoder: Encoder, kind: str) -> dict[str, NDArray[Any]]:
    key = hashlib.sha256(f"{table.sha256} {','.join(table.models)} {kind} {fold} {_code()}".encode()).hexdigest()[:24]
    file = CACHE / f"{key}.npz"
    if file.is_file():
        return dict(np.load(file))
    started = time.perf_counter()
    predictor = predictor_class(kind).fit(table.rows(folds != fold), encoder)
    fitted = time.perf_counter()
    prompts = [Prompt(p) for p, f in zip(table.prompt, folds, strict=True) if f == fold]
    found: dict[str, Any] = {}
    for name, router in parts_of(predictor).items():
        prediction = router.predict(prompts)
        found |= {f"{name}.quality": prediction.quality, f"{name}.uncertainty": prediction.uncertainty}
    CACHE.mkdir(parents=True, exist_ok=True)
    np.savez(file, **found)
    took = time.perf_counter() - fitted
    console.print(f"  {kind}, fold {fold}: fitted in {fitted - started:.0f} s, predicted in {took:.0f} s")
    return found


def _code() -> str:
    """A hash of everything in router/ that may bear on a prediction."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "router").glob("*.py")):
        if file.stem not in BESIDES:
            digest.update(file.read_bytes())
    return digest.hexdigest()


# One decision


def speed(encoder: Encoder) -> list[Row]:
    """Milliseconds of one decision on a prompt of 100 tokens, on one core, nothing cached; and the slow share."""
    from tokenizers import Tokenizer

    from signalbox.experts.models import resolve

    table = read_table(DATA / "mmlu_pro.parquet").pool(PEERS8)
    folds = folds_of(table, FOLDS)
    predictor = predictor_class("cascade").fit(table.rows(folds != 0), encoder)
    assert isinstance(predictor, CascadePredictor)
    tokenizer = Tokenizer.from_file(str(resolve(encoder.reference).path / "tokenizer.json"))
    tokenizer.no_truncation()
    prompts = []
    for prompt, fold in zip(table.prompt, folds, strict=True):
        ends = [end for _, end in tokenizer.encode(prompt, add_special_tokens=False).offsets]
        if fold == 0 and len(ends) >= 100:
            prompts.append(Prompt(prompt[: ends[99]]))
    prompts = prompts[:DECISIONS]
    rows = []
    for name, router in (("cascade", predictor), ("lexical", predictor.fast), ("stacked", predictor.slow)):
        took = []
        with one_thread():
            router.predict(prompts[:1])
            for prompt in prompts:
                encoder.clear()
                started = time.perf_counter()
                router.predict([prompt])
                took.append((time.perf_counter() - started) * 1e3)
        p50, p99 = (float(np.percentile(took, q)) for q in (50, 99))
        goal = "at most 2 ms" if name == "cascade" else None
        case = f"one decision, 100 tokens, one thread, {len(prompts)} prompts"
        rows.append(Row(case, f"p50, {name}", p50, "ms", min(took), max(took), None, goal, p50 <= 2 if goal else None))
        rows.append(Row(case, f"p99, {name}", p99, "ms"))
    held = [Prompt(p) for p, f in zip(table.prompt, folds, strict=True) if f == 0]
    rows.append(
        Row(
            "cascade, mmlu_pro peers8, fold 0",
            "share that took the slow way, whole prompts",
            predictor.slow_share(held),
        )
    )
    rows.append(
        Row(
            "cascade, mmlu_pro peers8, fold 0",
            "share that took the slow way, 100 tokens",
            predictor.slow_share(prompts),
        )
    )
    return rows


# Composition of Experts


def composition(encoder: Encoder) -> list[Row]:
    """The curve of quality over resident parameters on peers8, with the subject as the category."""
    from signalbox.serving.cli_composition import parameters_of, plan

    table = read_table(DATA / "mmlu_pro.parquet").pool(PEERS8)
    listed = ",".join(f"{name}={size:g}" for name, size in SIZES.items())
    sizes = np.array(list(parameters_of(listed, PEERS8).values()))
    names = tuple(sorted(set(table.task)))
    labels = np.array([names.index(task) for task in table.task])
    found = plan(table.score, PEERS8, names, labels, folds_of(table, FOLDS), sizes, sizes)
    case = "CoE, mmlu_pro peers8, subjects as categories"
    rows = [Row(case, f"quality, best single ({found.best_single})", found.best_single_quality)]
    for point in found.curve:
        experts = ", ".join(PEERS8[e] for e in point.map.kept)
        bound = 1.96 * point.held_out_se
        active = f"{point.map.average_active / 1e9:.1f}e9 active on the mean"
        metric = f"quality held out at {point.map.resident / 1e9:.1f}e9 resident, {active}: {experts}"
        rows.append(Row(case, metric, point.held_out, "", point.held_out - bound, point.held_out + bound))
    for name, (limit, point) in found.chosen.items():
        budget = "no limit" if limit is None else f"{limit / 1e9:.1f}e9"
        experts = ", ".join(PEERS8[e] for e in point.map.kept)
        rows.append(Row(case, f"quality at the {name} budget ({budget}): {experts}", point.map.quality))
    differences = [_brute_force_difference(seed) for seed in range(50)]
    goal = "equal to brute force"
    worst = max(differences)
    rows.append(
        Row(
            "CoE, 50 random pools of 2 to 7 experts",
            "MILP less brute force, largest",
            worst,
            goal=goal,
            met=worst < 1e-9,
        )
    )
    return rows


def _brute_force_difference(seed: int) -> float:
    """Quality of all subsets that fit a random budget, against the MILP's."""
    from itertools import combinations

    from signalbox.router.category_map import solve_map

    rng = np.random.default_rng(seed)
    experts, categories = int(rng.integers(2, 8)), int(rng.integers(1, 7))
    quality, sizes = rng.random((categories, experts)), rng.uniform(1, 50, experts) * 1e9
    frequency = rng.dirichlet(np.ones(categories))
    budget = float(rng.uniform(sizes.min(), sizes.sum()))
    subsets = [list(s) for k in range(1, experts + 1) for s in combinations(range(experts), k)]
    best = max(float(frequency @ quality[:, s].max(axis=1)) for s in subsets if sizes[s].sum() <= budget)
    return abs(best - solve_map(quality, frequency, sizes, budget).quality)


# The commands, end to end


def end_to_end() -> list[Row]:
    """`router train` and `router eval` as a user runs them, on 10,000 rows of 29 experts and 2,000 others."""
    known = read_table(DATA / "mmlu_pro.parquet")
    again = np.arange(10_000 - len(known))  # the first rows once more, as other prompts
    rows = replace(
        known,
        prompt_id=[*known.prompt_id, *(f"{known.prompt_id[i]} again" for i in again)],
        prompt=[*known.prompt, *(f"{known.prompt[i]}\n\nAnswer with the letter." for i in again)],
        source=[*known.source, *(known.source[i] for i in again)],
        task=[*known.task, *(known.task[i] for i in again)],
        measures={kind: np.concatenate([values, values[again]]) for kind, values in known.measures.items()},
    )
    fresh = known.rows(np.arange(2000))
    fresh = replace(fresh, prompt=[f"Think first.\n{p}" for p in fresh.prompt])
    folder = CACHE / "endtoend"
    write_table(rows, folder / "train.parquet")
    write_table(fresh, folder / "test.parquet")
    out = []
    for kind in ("lexical", "tryage"):
        started = time.perf_counter()
        for command in (
            ["train", "--kind", kind, "--table", "train.parquet", "--pool", "all", "--out", kind],
            ["eval", "--artifact", kind, "--table", "test.parquet", "--json", f"{kind}.json"],
        ):
            subprocess.run([Path(sys.executable).with_name("signalbox"), "router", *command], cwd=folder, check=True)
        took = time.perf_counter() - started
        case = f"train and eval, {len(rows)} x {len(rows.models)} and {len(fresh)} rows, with the reference lines"
        out.append(Row(case, f"seconds, {kind}", took, "s", goal="under 300 s on 2 cores", met=took < 300))
    return out


# Learning on line


def online() -> list[Row]:
    """A router shipped after 500 rows; the others come as requests, and outcomes teach it."""
    table = read_table(DATA / "mmlu_pro.parquet").pool(PEERS8)
    order = np.random.default_rng(0).permutation(len(table))
    known = table.rows(np.sort(order[:500]))
    taught = set(known.prompt)
    stream = table.rows(np.array([p not in taught for p in table.prompt]))
    base = predictor_class("lexical").fit(known, None)
    rows = []
    for name, poison in (
        ("outcomes", None),
        ("inverted outcomes from a quarter to a half", Poisoning("inverted", 0.25, 0.5)),
    ):
        found = replay(base, stream, poisoning=poison, windows=8, learning=Learning())
        case = f"online, mmlu_pro peers8, shipped after 500 rows, {found.requests} {name}"
        bound = 1.96 * found.gain_se
        goal = "above the shipped artifact" if poison is None else "no worse than the shipped artifact by .01"
        met = found.gain > 0 if poison is None else found.gain > -0.01
        rows.append(
            Row(
                case,
                "gain over the shipped artifact",
                found.gain,
                "",
                found.gain - bound,
                found.gain + bound,
                0.0,
                goal,
                met,
            )
        )
        rows.append(Row(case, "share explored", found.explored))
        rows.append(Row(case, "rollbacks", len(found.rollbacks)))
        for i, window in enumerate(found.windows):
            rows.append(Row(case, f"regret, window {i + 1} of 8", window.regret, reference=window.frozen_regret))
    return rows


if __name__ == "__main__":
    typer.run(main)
