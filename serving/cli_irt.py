"""`signalbox router add-expert`: one more expert in a trained router of kind irt, from a few dozen scored prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from signalbox.serving.cli_common import told


def add_expert_command(
    artifact: Annotated[Path, typer.Option(help="folder of a trained router of kind irt")],
    table: Annotated[Path, typer.Option(help="table with the new expert's scores (or losses) on a few dozen prompts")],
    expert: Annotated[str, typer.Option(help="name of the new expert: its column in the table, and in the pool")],
    out: Annotated[Path, typer.Option(help="folder of the router with the new expert")],
) -> None:
    """Add an expert to a trained router, without training the others again.

    The prompts may be some that the router was trained on, or others; rows without a score of the expert are passed
    over.
    """
    with told():
        import numpy as np

        from signalbox.router.artifact import ArtifactError, load_predictor, read_artifact, save_artifact
        from signalbox.router.base import Prompt
        from signalbox.router.irt import IrtPredictor
        from signalbox.router.table import read_table
        from signalbox.router.train import mean_cost, prompt_hash

        found = read_artifact(artifact)
        if found.kind != IrtPredictor.kind:
            raise ArtifactError(
                f"{artifact} is a router of kind {found.kind}: only one of kind irt takes a new expert without "
                f"training (signalbox router train --kind irt)"
            )
        rows = read_table(table).pool([expert]).complete()
        predictor = load_predictor(artifact)
        assert isinstance(predictor, IrtPredictor)
        prompts = [Prompt(text) for text in rows.prompt]
        larger = predictor.add_expert(expert, prompts, rows.score[:, 0])
        fresh = larger.to_artifact()
        # What the new expert learned from must not judge it later.
        seen = [prompt_hash(text) for text in rows.prompt]
        known = found.tensors.get("seen", np.empty(0, dtype=np.int64))
        tensors = {**fresh.tensors, "seen": np.union1d(known, np.array(seen, dtype=np.int64))}
        training = {**fresh.training, "mean_cost": {**fresh.training.get("mean_cost", {}), **mean_cost(rows)}}
        training.pop("neighbours_encoder", None)  # of the rows kept for the kNN line, none has the new expert's score
        saved = replace(fresh, tensors=tensors, training=training)
        save_artifact(saved, out)
        facts = training["added"][expert]
        chosen = larger.predict(prompts).quality.argmax(axis=1) == len(larger.experts) - 1
        Console().print(
            f"added {expert} from {facts['rows']} scored prompts (mean score {facts['mean_score']:.4f}): "
            f"mean quality {facts['bias']:.4f} ± {facts['bias_sd']:.4f}, chosen for {chosen.mean():.0%} of them: "
            f"{out} (version {saved.version})",
            markup=False,
            soft_wrap=True,
        )
