"""`signalbox esft score | select | train`: adapters of retrained experts, for mixture-of-experts bases."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from signalbox.serving.cli_adapters_train import QUICKSTART, show, watched
from signalbox.serving.cli_common import console, told

if TYPE_CHECKING:
    from signalbox.adapters.esft_scores import ExpertScores
    from signalbox.serving.train_esft import EsftRecipe

esft_app = typer.Typer(
    help="Make ESFT adapters: score a base's experts on a task, select the relevant ones, train only those.",
    no_args_is_help=True,
)

Base = Annotated[
    str, typer.Option(help="mixture-of-experts base: expert of the configuration, or a model: pypi:, hf: or a path")
]
Data = Annotated[Path, typer.Option(help="table of texts and labels or answers: .parquet, .csv or .jsonl")]
ConfigFile = Annotated[Path, typer.Option(help="configuration that declares the expert")]
Kind = Annotated[str, typer.Option(help="classification, completion or auto")]
Text = Annotated[str | None, typer.Option(help="column of the texts")]
Label = Annotated[str | None, typer.Option(help="column of the labels or answers")]
Samples = Annotated[int, typer.Option(min=1, help="most samples that the experts are scored on")]
SampleLength = Annotated[int, typer.Option(min=1, help="tokens of a sample, at most the base's context")]
Holdout = Annotated[float, typer.Option(min=0.01, max=0.5, help="share of texts that only the held-out score sees")]
Seed = Annotated[int, typer.Option(help="of the samples, and of the order of rows")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Threads = Annotated[int | None, typer.Option(min=1, help="torch threads on CPU")]
ScoreName = Annotated[
    str, typer.Option("--score", help="token: share of a task's tokens that choose an expert; gate: its average weight")
]
Threshold = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="what a layer's selected experts sum to; default 0.2 for token, 0.1 for gate"),
]
Normalise = Annotated[str, typer.Option(help="layer: divide a layer's scores by their sum first; none: as measured")]


@esft_app.command("score")
def score_command(
    base: Base,
    data: Data,
    out: Annotated[Path, typer.Option(help="file for the scores (JSON)")],
    config: ConfigFile = QUICKSTART,
    kind: Kind = "auto",
    text: Text = None,
    label: Label = None,
    samples: Samples = 32,
    sample_length: SampleLength = 4096,
    holdout: Holdout = 0.1,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Run the base over a task's rows and write how relevant each routed expert is, by both scores of the paper."""
    from signalbox.adapters.esft_scores import write_scores
    from signalbox.serving.train_esft import score_base
    from signalbox.serving.training import Effort, base_of

    with _refusals():
        _check_writable(out)
        recipe = _recipe(
            data=str(data),
            kind=kind,
            text=text,
            label=label,
            samples=samples,
            sample_length=sample_length,
            holdout=holdout,
            seed=seed,
        )
        with watched() as watcher:
            file = score_base(base_of(base, config), recipe, Effort(device, threads), watcher)
        write_scores(out, file)
        console.print(f"wrote {out}; to choose experts: signalbox esft select {out}", markup=False, soft_wrap=True)


@esft_app.command("select")
def select_command(
    scores: Annotated[Path, typer.Argument(help="file that `signalbox esft score` wrote", metavar="SCORES")],
    out: Annotated[Path, typer.Option(help="file for the selection, in the released format")] = Path("expert_cfg.json"),
    score: ScoreName = "token",
    threshold: Threshold = None,
    normalise: Normalise = "layer",
) -> None:
    """Choose in each layer the most relevant experts, until their scores sum to the threshold."""
    from signalbox.adapters.esft_scores import read_scores
    from signalbox.adapters.esft_select import select_experts, write_selection

    with _refusals():
        _check_writable(out)
        recipe = _recipe(data=str(scores), score=score, threshold=threshold, normalise=normalise)
        file = read_scores(scores)
        chosen = select_experts(file.scores, recipe.score, recipe.threshold, recipe.normalise)
        write_selection(out, chosen)
        _show_selection(file.scores, chosen, score)
        console.print(f"wrote {out}; to train them: signalbox esft train --experts {out}", markup=False, soft_wrap=True)


@esft_app.command("train")
def train_command(
    base: Base,
    data: Data,
    out: Annotated[Path, typer.Option(help="folder for the adapter")],
    experts: Annotated[
        Path | None, typer.Option(help="expert_cfg.json of `esft select`; else the experts are chosen here")
    ] = None,
    scores: Annotated[Path | None, typer.Option(help="file of `esft score`; else the experts are scored here")] = None,
    config: ConfigFile = QUICKSTART,
    kind: Kind = "auto",
    text: Text = None,
    label: Label = None,
    score: ScoreName = "token",
    threshold: Threshold = None,
    normalise: Normalise = "layer",
    samples: Samples = 32,
    sample_length: SampleLength = 4096,
    steps: Annotated[int | None, typer.Option(min=1, help="default 500, unless --epochs is given")] = None,
    epochs: Annotated[float | None, typer.Option(min=0.001, help="instead of steps")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="most minutes of training")] = None,
    lr: Annotated[float, typer.Option(help="highest learning rate")] = 1e-5,
    schedule: Annotated[str, typer.Option(help="of the learning rate: constant or cosine")] = "constant",
    weight_decay: Annotated[float, typer.Option(min=0.0)] = 0.1,
    batch: Annotated[int, typer.Option(min=1)] = 32,
    holdout: Holdout = 0.1,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    eval_rows: Annotated[int | None, typer.Option(min=1, help="most held-out rows to score")] = None,
) -> None:
    """Train a task's experts and nothing else, and report what the adapter is worth on rows held out."""
    from signalbox.serving.train_esft import train_esft
    from signalbox.serving.training import Effort, base_of

    if experts is not None and scores is not None:
        raise typer.BadParameter("give --experts or --scores, not both")
    if steps is not None and epochs is not None:
        raise typer.BadParameter("give --steps or --epochs, not both")
    length = {"steps": steps or 500} if epochs is None else {"steps": None, "epochs": epochs}
    with _refusals():
        _check_writable(out, folder=True)
        recipe = _recipe(
            data=str(data),
            kind=kind,
            text=text,
            label=label,
            score=score,
            threshold=threshold,
            normalise=normalise,
            samples=samples,
            sample_length=sample_length,
            minutes=minutes,
            rate=lr,
            schedule=schedule,
            weight_decay=weight_decay,
            batch=batch,
            holdout=holdout,
            seed=seed,
            **length,
        )
        effort = Effort(device, threads, eval_rows=eval_rows)
        with watched() as watcher:
            report = train_esft(base_of(base, config), recipe, out, effort, watcher, experts=experts, scores=scores)
        show(report)
        console.print(f"wrote {out}; to serve it: signalbox adapters add NAME {out}", markup=False, soft_wrap=True)


def _recipe(**options: Any) -> EsftRecipe:
    from pydantic import ValidationError

    from signalbox.serving.train_esft import EsftRecipe

    try:
        return EsftRecipe.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _check_writable(out: Path, *, folder: bool = False) -> None:
    """Raises `TrainingError` where `out` cannot be written, before the work and not after it."""
    from signalbox.adapters.train_data import TrainingError

    if not folder and out.is_dir():
        raise TrainingError(f"{out} is a folder; name a file")
    above = out.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise TrainingError(f"{out} cannot be written: {above} is no folder that may be written to; name another")


@contextmanager
def _refusals() -> Iterator[None]:
    """What a user can mend is said in a line, with exit code 2."""
    from signalbox.adapters.base import AdapterError
    from signalbox.adapters.train_data import TrainingError
    from signalbox.experts.base import ExpertError
    from signalbox.experts.models import ModelUnavailable

    with told():
        try:
            yield
        except (TrainingError, AdapterError, ExpertError, ModelUnavailable, OSError) as error:
            console.print(f"error: {error}", markup=False, style="red", soft_wrap=True)
            raise typer.Exit(2) from None


def _show_selection(scores: ExpertScores, chosen: dict[int, tuple[int, ...]], score: str) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("layer", "experts", f"{score} score", "of"):
        table.add_column(heading, justify="right")
    table.add_column("ids", overflow="fold")
    for layer, row in zip(scores.layers, scores.gate if score == "gate" else scores.token, strict=True):
        ids = chosen[layer]
        taken, whole = float(row[list(ids)].sum()), float(row.sum())
        table.add_row(str(layer), str(len(ids)), f"{taken:.3f}", f"{whole:.3f}", " ".join(map(str, ids)))
    console.print(table)
    count, routed = sum(map(len, chosen.values())), scores.token.numel()
    console.print(f"{count} of {routed} experts, {count / routed:.1%}", markup=False)
