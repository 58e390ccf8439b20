"""`signalbox router collect | train | eval`: from a pool and texts to a trained router, and what it is worth."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from signalbox.serving.cli_common import (
    ENCODER,
    Budget,
    Descriptions,
    Parameters,
    Pool,
    console,
    facts_of,
    names_of,
    pair_of,
    progress_bars,
    reference_lines,
    told,
    training_report,
)
from signalbox.serving.cli_compare import compare_command, objective_of, show_comparison
from signalbox.serving.cli_composition import plan_command
from signalbox.serving.cli_describe import describe_command
from signalbox.serving.cli_irt import add_expert_command
from signalbox.serving.cli_replay import replay_command

# Torch and the encoder are imported inside the commands: `signalbox --help` must not wait for them.
if TYPE_CHECKING:
    from signalbox.experts.catalog import ExpertConfig
    from signalbox.router.collect import Collected, Scorer
    from signalbox.router.judge import Evaluation
    from signalbox.router.texts import Text
    from signalbox.serving.config import Config

# As `router.kinds`, whose package imports NumPy; a test holds them together.
TRAINABLE = (
    "best (cross-validates them all), tryage, linear, knn, composition, glider, irt, skills, lexical, stacked, "
    "cascade, single"
)

router_app = typer.Typer(name="router", help="Collect labels, train a router, evaluate it.", no_args_is_help=True)
router_app.command("compare")(compare_command)
router_app.command("plan")(plan_command)
router_app.command("replay")(replay_command)
router_app.command("add-expert")(add_expert_command)
router_app.command("describe")(describe_command)


@router_app.command("collect")
def collect_command(
    config: Annotated[Path, typer.Option(help="configuration file that declares the experts")],
    out: Annotated[Path, typer.Option(help="table to write: .parquet, .csv or .jsonl")],
    texts: Annotated[list[Path] | None, typer.Option(help="files or folders with prompts and references")] = None,
    more_texts: Annotated[list[Path] | None, typer.Argument(metavar="[PATH]...", help="further files")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="most texts of a task")] = None,
    pool: Pool = "all",
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="texts in flight at one expert")] = 1,
) -> None:
    """Run every expert over texts and record its loss, tokens, milliseconds and cost.

    Killed and started again with the same arguments, it goes on where it stopped.
    """
    with told():
        from signalbox.router.table import write_table
        from signalbox.router.texts import read_texts
        from signalbox.serving.config import load_config

        _check_format(out)
        paths = [*(texts or []), *(more_texts or [])]
        if not paths:
            raise typer.BadParameter("name at least one file of texts: --texts PATH...")
        loaded = load_config(config)
        members = _pool_of(pool_members(loaded), pool)
        chosen = read_texts(paths, limit)
        journal = out.with_name(f"{out.name}.partial.jsonl")
        collected = asyncio.run(collect_pool(members, chosen, journal, concurrency))
        write_table(collected.table, out)
        if collected.failed:
            console.print(f"[yellow]{collected.failed} measurements failed[/yellow]; run again to try just them, e.g.")
            for failure in collected.failures[:5]:
                console.print(f"  {failure.expert} on {failure.prompt_id}: {failure.error}", markup=False)
        else:
            journal.unlink(missing_ok=True)
        console.print(f"{len(collected.table)} rows ({collected.resumed} results of a former run) in {out}")


@dataclass(frozen=True)
class Member:
    """One expert of a pool to collect from: a declared one, or (`adapter`: its short name and folder) one on `base`."""

    base: str
    config: ExpertConfig
    adapter: tuple[str, Path] | None = None


def pool_members(config: Config) -> dict[str, Member]:
    """All experts that a configuration declares, adapters among them, by their full names."""
    experts = {name: Member(name, expert) for name, expert in config.experts.items()}
    adapted = {
        f"{adapter.base}:{name}": Member(adapter.base, config.experts[adapter.base], (name, adapter.path))
        for name, adapter in config.adapters.items()
        if adapter.routable
    }
    return experts | adapted


async def collect_pool(
    members: dict[str, Member], texts: list[Text], journal: Path | None, concurrency: int = 1
) -> Collected:
    """Start the experts' engines, collect, and close them, whatever happens; shows progress on stderr."""
    from signalbox.experts.adapted_engine import AdaptedEngine
    from signalbox.experts.engines import build_engine
    from signalbox.router.collect import collect

    bases = {member.base: build_engine(member.base, member.config) for member in members.values()}
    engines: dict[str, Scorer] = {}
    try:
        for name, engine in bases.items():
            console.print(f"loading {name}")
            await engine.start()
        for name, member in members.items():
            engines[name] = bases[member.base]
            if member.adapter is not None:
                short, path = member.adapter
                await bases[member.base].load(short, str(path))
                engines[name] = AdaptedEngine(bases[member.base], short)
        with progress_bars() as bar:
            tasks = {name: bar.add_task(name, total=len(texts)) for name in engines}

            def report(expert: str, done: int, total: int, failed: int) -> None:
                note = f" ({failed} failed)" if failed else ""
                bar.update(tasks[expert], completed=done, total=total, description=f"{expert}{note}")

            return await collect(
                engines,
                texts,
                prices={name: member.config.price for name, member in members.items()},
                journal=journal,
                fingerprints={name: _fingerprint(member) for name, member in members.items()},
                concurrency=concurrency,
                report=report,
            )
    finally:
        await asyncio.gather(*(engine.close() for engine in bases.values()), return_exceptions=True)


def _fingerprint(member: Member) -> str:
    """Hash of what bears on an expert's losses: not its price, its speed or its limits."""
    keys = {"engine", "model", "chat_template", "dtype", "base_url", "load_format"}
    fields = member.config.model_dump(mode="json", include=keys)
    digest = hashlib.sha256(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS))
    for file in sorted(member.adapter[1].iterdir()) if member.adapter is not None else ():
        if file.suffix == ".safetensors" or file.name in ("adapter_config.json", "expert_cfg.json"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


@router_app.command("train")
def train_command(
    table: Annotated[Path, typer.Option(help="table of scores or losses")],
    out: Annotated[Path, typer.Option(help="folder of the trained router")],
    kind: Annotated[str, typer.Option(help=f"which router to train: {TRAINABLE}")] = "tryage",
    pool: Pool = "all",
    objective: Annotated[str, typer.Option(help="for `best`, what decides: quality, aiq or apgr")] = "quality",
    pair: Annotated[str | None, typer.Option(metavar="WEAK:STRONG", help="two experts, for APGR and CPT")] = None,
    holdout: Annotated[float, typer.Option(min=0.0, max=0.9, help="share of rows kept for evaluation")] = 0.2,
    parameters: Parameters = None,
    budget: Budget = None,
    descriptions: Descriptions = None,
    seed: Annotated[int, typer.Option(help="for the parts that draw at random")] = 0,
    encoder: Annotated[str, typer.Option(help="sentence encoder: pypi:, hf: or a path")] = ENCODER,
    neighbours: Annotated[
        bool, typer.Option(help="keep the training rows' embeddings, so that `eval` can tell what kNN would reach")
    ] = True,
) -> None:
    """Train a router and report what it is worth on the rows held out."""
    with told():
        from signalbox.router import train as training
        from signalbox.router.artifact import predictor_class, read_artifact
        from signalbox.router.compare import best_kind
        from signalbox.router.encoder import load_encoder
        from signalbox.router.evaluate import evaluate
        from signalbox.router.table import read_table

        aim = objective_of(objective)
        needed = kind == "best" or predictor_class(kind).uses_encoder or neighbours  # raises before anything slow
        rows, names = read_table(table), names_of(pool)
        weak_strong = None if pair is None else pair_of(pair, names or rows.models)
        facts = facts_of(names or rows.models, parameters, budget, descriptions)
        reader = load_encoder(encoder) if needed else None
        compared = {}
        if kind == "best":
            assert reader is not None
            with progress_bars() as bar:
                choice, comparison = best_kind(
                    training.split(rows, names, holdout)[0],
                    reader,
                    objective=aim,
                    pair=weak_strong,
                    seed=seed,
                    facts=facts,
                    report=training_report(bar),
                )
            show_comparison(comparison, choice)
            kind, compared = choice.kind, choice.to_json()
        with progress_bars() as bar:
            trained = training.train(
                rows,
                reader,
                kind=kind,
                pool=names,
                holdout=holdout,
                seed=seed,
                facts=facts,
                report=training_report(bar),
            )
            trained.figures.update(compared)
            known = training.neighbours_of(trained, training_report(bar)) if neighbours else None
        training.save(trained, out, neighbours=known or False)
        artifact = read_artifact(out)
        console.print(
            f"trained {kind} on {len(trained.training)} rows, head {artifact.training.get('head', '-')}: "
            f"{out} (version {artifact.version})"
        )
        if len(trained.held_out):
            result = evaluate(
                trained.predictor,
                trained.held_out,
                trained.encoder,
                artifact=artifact,
                neighbours=known,
                pair=weak_strong,
            )
            show(result, f"{kind} on {result.rows} rows held out")
        else:
            console.print("no row was held out; `signalbox router eval` judges it on another table")


@router_app.command("eval")
def eval_command(
    artifact: Annotated[Path, typer.Option(help="folder of the trained router")],
    table: Annotated[Path, typer.Option(help="table with the router's experts; rows it was trained on are left out")],
    pair: Annotated[str | None, typer.Option(metavar="WEAK:STRONG", help="two experts, for APGR and CPT")] = None,
    json: Annotated[Path | None, typer.Option(help="file for the figures")] = None,
) -> None:
    """Judge a router on rows it has not seen, beside best single, majority, random, kNN and oracle."""
    with told():
        from signalbox.router.artifact import load_neighbours, load_predictor, read_artifact
        from signalbox.router.encoder import load_encoder
        from signalbox.router.evaluate import evaluate
        from signalbox.router.table import read_table

        found = read_artifact(artifact)
        weak_strong = None if pair is None else pair_of(pair, found.experts)
        rows = read_table(table).pool(found.experts)
        neighbours = load_neighbours(artifact)
        reference = found.encoder or (found.training.get("neighbours_encoder") if neighbours else None)
        encoder = load_encoder(reference) if reference else None
        predictor = load_predictor(artifact, encoder=encoder)
        with progress_bars() as bar:
            result = evaluate(
                predictor,
                rows,
                encoder,
                artifact=found,
                neighbours=neighbours,
                pair=weak_strong,
                progress=training_report(bar),
            )
        show(result, f"{found.kind} {found.version} on {result.rows} rows of {table.name}")
        if json is not None:
            json.parent.mkdir(parents=True, exist_ok=True)
            json.write_bytes(orjson.dumps(result.to_json(), option=orjson.OPT_INDENT_2) + b"\n")


def show(result: Evaluation, title: str, out: Console | None = None) -> None:
    """Print an evaluation: the reference lines, each task, and what else there is to say."""
    out = out or Console()
    out.print(f"[bold]{escape(title)}[/bold]")
    out.print(reference_lines(result, ("this router", f"[bold]{result.quality:.4f}[/bold] ± {result.quality_se:.4f}")))
    verdict = "[green]better[/green]" if result.wins else "[yellow]not clearly better[/yellow]"
    out.print(f"gain over best single {result.gain:+.4f} ± {result.gain_se:.4f} (paired): {verdict}")
    usual = result.majority_optimal_selection
    bits = "" if result.regret_bits is None else f" ({result.regret_bits:.4f} bits per byte)"
    out.print(
        f"optimal selection {result.optimal_selection:.1%}"
        + ("" if usual is None else f" (majority {usual:.1%})")
        + f"; regret {result.regret:.4f}{bits}"
    )
    if result.aiq is not None and result.aiq_hull is not None:
        out.print(f"AIQ {result.aiq:.4f} (hull of the single experts {result.aiq_hull:.4f})")
    if result.pair is not None:
        out.print(
            f"from {escape(result.pair[0])} to {escape(result.pair[1])}: APGR {result.apgr:.4f}, "
            f"CPT(50 %) {result.cpt50:.1%}, CPT(80 %) {result.cpt80:.1%} of the calls (random .5, 50 %, 80 %)"
        )
    if result.collapse:
        most, share = result.most_chosen
        half = result.collapse[len(result.collapse) // 2]
        out.print(
            f"most chosen: {escape(most)} {share:.0%}, "
            f"at half the budget {escape(half['most_chosen'])} {half['share']:.0%}"
        )
    if result.bare_text_quality is not None:
        out.print(f"shown the bare text without instruction: quality {result.bare_text_quality:.4f}")
    z = result.calibration
    out.print(
        f"uncertainty: z rms {z['z_rms']:.2f}, within one deviation {z['within_1sd']:.1%}, two {z['within_2sd']:.1%}"
    )
    for name, change in (result.robustness or {}).items():
        out.print(
            f"prompts with changed {name}: quality {change['difference']:+.4f}, same choice {change['same']:.0%} "
            f"({change['rows']:.0f} rows)"
        )
    if result.decision_ms is not None:
        slow = "" if result.slow_share is None else f", {result.slow_share:.0%} the slow way"
        out.print(
            f"decision p50 {result.decision_ms['p50']:.2f} ms, p99 {result.decision_ms['p99']:.2f} ms, "
            f"one thread, encoder included{slow}"
        )
    if len(result.tasks) > 1:
        out.print(_task_table(result))


def _task_table(result: Evaluation) -> RichTable:
    tasks = RichTable(title="by task", title_justify="left")
    for column in ("task", "rows", "router", "best single", "random", "oracle", "optimal", "most chosen"):
        words = column in ("task", "best single", "most chosen")
        # On a narrow terminal names are cut, figures never.
        tasks.add_column(column, justify="left" if words else "right", no_wrap=True, min_width=None if words else 6)
    for name, task in result.tasks.items():
        most, share = max(task["share"].items(), key=lambda item: item[1])
        tasks.add_row(
            escape(name),
            str(task["rows"]),
            f"{task['quality']:.4f}",
            f"{task['best_single']:.4f} {escape(task['best_single_expert'])}",
            f"{task['random']:.4f}",
            f"{task['oracle']:.4f}",
            f"{task['optimal_selection']:.0%}",
            f"{share:.0%} {escape(most)}",
        )
    return tasks


def _pool_of(experts: dict[str, Member], pool: str) -> dict[str, Member]:
    names = names_of(pool)
    if names is None:  # what `auto` may not choose needs no label
        names = [name for name, member in experts.items() if member.config.routable]
    unknown = [name for name in names if name not in experts]
    if unknown:
        raise typer.BadParameter(f"no expert named {', '.join(unknown)} (there are: {', '.join(experts)})")
    return {name: experts[name] for name in names}


def _check_format(out: Path) -> None:
    if out.suffix.lower() not in (".parquet", ".csv", ".jsonl", ".ndjson"):
        raise typer.BadParameter(f"--out {out}: use a file that ends in .parquet, .csv or .jsonl")
