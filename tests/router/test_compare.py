from __future__ import annotations

import shutil
import subprocess
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import orjson
import pytest
from typer.testing import CliRunner

from signalbox.router import compare as comparing
from signalbox.router.artifact import ArtifactError, load_predictor, read_artifact
from signalbox.router.base import Prediction, Prompt
from signalbox.router.compare import Comparison, Contender, all_kinds, choose, compare
from signalbox.router.crossvalidate import cross_validate, folds_of, lines_of_folds
from signalbox.router.encoder import SentenceEncoder
from signalbox.router.judge import judge
from signalbox.router.report_html import report
from signalbox.router.table import Table, TableError, write_table
from signalbox.serving.cli_router import router_app
from tests.router.conftest import planted

run = CliRunner()
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def priced(table: Table) -> Table:
    cost = np.array([1e-4, 3e-4, 2e-3]) * np.random.default_rng(0).uniform(0.5, 1.5, (len(table), 3))
    return replace(table, measures={**table.measures, "cost": cost})


@pytest.fixture(scope="module")
def compared(encoder: SentenceEncoder) -> Comparison:
    table = priced(planted(200, scores=True))
    return compare(table, encoder, kinds=["lexical", "linear", "single"], pair=("sporty", "cook"), folds=3)


@pytest.fixture(scope="module")
def page(compared: Comparison) -> str:
    return report(compared, choose(compared), "Routers on <planted>")


def test_every_row_is_predicted_by_a_router_that_has_not_seen_it(encoder: SentenceEncoder) -> None:
    """Labels are noise of each prompt alone: who has seen a row could tell it, who has not cannot."""
    rng = np.random.default_rng(0)
    table = replace(planted(240), measures={"score": rng.random((240, 3))})
    folds = folds_of(table, 3)
    found = cross_validate("lexical", table, None, folds)["lexical"]
    seen = found.last.predict([Prompt(p) for p in table.prompt])
    assert np.allclose(seen.quality[found.held], found.prediction.quality[found.held])
    assert not np.allclose(seen.quality[~found.held], found.prediction.quality[~found.held])
    centred = found.prediction.quality - found.prediction.quality.mean(axis=0)
    assert abs(np.corrcoef(centred.ravel(), table.score.ravel())[0, 1]) < 0.15
    lines = lines_of_folds(table, encoder, folds)
    assert lines.knn is not None and abs(lines.knn.mean() - 0.5) < 0.06


def test_a_cascade_brings_its_parts_along(encoder: SentenceEncoder) -> None:
    table = planted(150)
    folds = folds_of(table, 2)
    together = cross_validate("cascade", table, encoder, folds)
    alone = cross_validate("lexical", table, encoder, folds)
    assert set(together) == {"cascade", "lexical", "stacked"} and set(alone) == {"lexical"}
    assert np.allclose(together["lexical"].prediction.quality, alone["lexical"].prediction.quality)
    compared = compare(table, encoder, kinds=["lexical", "stacked", "cascade"], folds=2)
    assert [c.kind for c in compared.contenders] == ["lexical", "stacked", "cascade"] and len(compared.fitted) == 3


def test_a_prompt_that_stands_twice_is_in_one_fold() -> None:
    table = planted(60)
    twice = replace(table, prompt=[*table.prompt[:30], *(p.upper() + " " for p in table.prompt[:30])])
    folds = folds_of(twice, 3)
    assert np.array_equal(folds[:30], folds[30:])
    with pytest.raises(TableError, match="too few for 50 folds"):
        folds_of(planted(20), 50)


def test_the_figures_of_a_comparison(compared: Comparison) -> None:
    lexical, linear, single = (c.evaluation for c in compared.contenders)
    assert lexical is not None and linear is not None and single is not None
    assert lexical.wins and linear.wins and not single.wins
    # Fold by fold the best single is the best of the *other* folds: at most the best in hindsight.
    assert single.quality <= single.best_single + 1e-12 and single.gain <= 1e-12
    assert lexical.rows == len(compared.rows) == 200 and lexical.decision_ms is not None
    assert lexical.aiq is not None and lexical.aiq > 0.05 + lexical.aiq_hull  # type: ignore[operator]
    assert lexical.knn_rows == 200 and lexical.told_task is not None and lexical.apgr is not None
    assert orjson.loads(orjson.dumps(compared.to_json()))["lexical"]["quality"] == lexical.quality


def test_a_table_to_judge_on(encoder: SentenceEncoder) -> None:
    known, test = planted(160, scores=True), planted(80, seed=1, scores=True)
    mixed = replace(test, prompt=[*known.prompt[:10], *test.prompt[10:]])
    found = compare(known, encoder, kinds=["lexical", "tryage"], test=mixed)
    new = sum(p.lower() not in {k.lower() for k in known.prompt} for p in mixed.prompt)
    assert found.folds == 0 and len(found.rows) == new <= 70  # prompts of the training table are left out
    assert [c.kind for c in found.contenders] == ["lexical", "tryage"]
    assert all(c.evaluation is not None and c.evaluation.rows == new and c.evaluation.wins for c in found.fitted)
    assert found.contenders[0].prediction is not None and len(found.contenders[0].prediction.quality) == new


def test_the_choice_on_a_table_of_its_own_knows_the_costs_of_training(encoder: SentenceEncoder) -> None:
    """As the figures beside it do: on the judged rows the experts' prices stand the other way round."""
    known, test = priced(planted(120, scores=True)), priced(planted(80, seed=1, scores=True))
    turned = replace(test, measures={**test.measures, "cost": test.measures["cost"][:, ::-1]})
    found = compare(known, encoder, kinds=["lexical"], test=turned)
    evaluation = found.contenders[0].evaluation
    assert evaluation is not None and evaluation.aiq is not None and evaluation.aiq_hull is not None
    assert choose(found, "aiq").gains["lexical"][0] == pytest.approx(evaluation.aiq - evaluation.aiq_hull)


def test_a_kind_that_cannot_learn_does_not_stop_the_others(
    encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise TableError("not from this table")

    cls = comparing.predictor_class("linear")
    monkeypatch.setattr(cls, "fit", refuse)
    found = compare(planted(100), encoder, kinds=["linear", "lexical"], folds=2)
    assert found.contenders[0].error == "not from this table" and len(found.fitted) == 1
    assert "not from this table" in report(found, choose(found), "x")


def contest(gains: dict[str, float], noise: float = 0.05, rows: int = 400) -> Comparison:
    """Kinds that choose the better of two experts on so much larger a share of the prompts."""
    rng = np.random.default_rng(0)
    best = rng.integers(2, size=rows)
    score = np.clip([0.4, 0.5] + 0.4 * (np.eye(2)[best] - 0.5) + rng.normal(0, noise, (rows, 2)), 0, 1)
    cost = np.tile([1.0, 2.0], (rows, 1))
    ids = [str(i) for i in range(rows)]
    table = Table(("a", "b"), ids, ids, {"score": score, "cost": cost})
    contenders = []
    for kind, share in gains.items():
        right = rng.random(rows) < share
        quality = np.eye(2, dtype=np.float32)[np.where(right, best, rng.integers(2, size=rows))]
        prediction = Prediction(table.models, quality, np.ones_like(quality), 1.0)
        contenders.append(Contender(kind, prediction, judge(table, prediction)))
    return Comparison(table, contenders, 5, pair=("a", "b"))


@pytest.mark.parametrize("objective", ["quality", "aiq", "apgr"])
def test_the_best_is_chosen(objective: comparing.Objective) -> None:
    choice = choose(contest({"knn": 0.3, "lexical": 0.8, "linear": 0.5}), objective)
    assert choice.kind == "lexical" and "lexical has the best" in choice.reason
    assert choice.gains["lexical"][0] > choice.gains["linear"][0] > choice.gains["knn"][0] > 0


@pytest.mark.parametrize("objective", ["quality", "aiq", "apgr"])
def test_where_none_wins_no_router_is_chosen(objective: comparing.Objective) -> None:
    choice = choose(contest({"knn": 0.0, "lexical": 0.0}), objective)
    assert choice.kind == "single" and "no router beats the best single expert" in choice.reason


def test_an_objective_needs_its_columns() -> None:
    found = contest({"knn": 0.5})
    bare = replace(found, rows=replace(found.rows, measures={"score": found.rows.score}), pair=None)
    with pytest.raises(TableError, match="cost:<model>"):
        choose(bare, "aiq")
    with pytest.raises(TableError, match="WEAK:STRONG"):
        choose(bare, "apgr")


def test_best_serves_a_router_where_one_wins_and_says_where_none_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "all_kinds", lambda: ["lexical", "linear"])
    for name, signal, kinds in (("signal", 1.0, ("lexical", "linear")), ("noise", 0.0, ("single",))):
        write_table(planted(200, signal=signal), tmp_path / f"{name}.jsonl")
        arguments = [
            "train",
            "--kind",
            "best",
            "--table",
            str(tmp_path / f"{name}.jsonl"),
            "--out",
            str(tmp_path / name),
        ]
        result = run.invoke(router_app, arguments)
        assert result.exit_code == 0, result.output
        artifact = read_artifact(tmp_path / name)
        assert artifact.kind in kinds
        assert set(artifact.training["compared"]) == {"lexical", "linear"}
        assert ("no router beats" in " ".join(result.output.split())) == (name == "noise")
        load_predictor(tmp_path / name).predict([Prompt("Why does the oven matter?")])


def test_every_kind_is_among_them() -> None:
    assert {"tryage", "composition", "glider", "knn", "linear", "irt", "skills", "lexical"} < set(all_kinds())
    assert "single" not in all_kinds()
    with pytest.raises(ArtifactError, match="did you mean lexical"):
        comparing.predictor_class("lexicall")


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for name, v in attrs if name in ("src", "href", "data", "action")]
        if tag in ("script", "link", "iframe", "img"):
            self.found.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_that_loads_nothing(page: str) -> None:
    links = Links()
    links.feed(page)
    assert links.found == [] and links.open == []
    assert "http" not in page and "@import" not in page and "url(" not in page
    assert "&lt;planted&gt;" in page and "<planted>" not in page
    for heading in ("Who chooses best", "Cost against quality", "Calibration", "Robustness", "Collapse", "By task"):
        assert f"<h2>{heading}" in page
    assert page.count("<svg") == 3 and "NaN" not in page and "inf" not in page.replace("information", "")


def test_the_command_writes_page_and_figures(tmp_path: Path) -> None:
    write_table(priced(planted(120, scores=True)), tmp_path / "t.csv")
    arguments = ["compare", "--table", str(tmp_path / "t.csv"), "--kinds", "lexical,single", "--folds", "2"]
    arguments += ["--pair", "sporty:cook", "--html", str(tmp_path / "a" / "r.html"), "--json", str(tmp_path / "r.json")]
    result = run.invoke(router_app, arguments)
    assert result.exit_code == 0, result.output
    found = orjson.loads((tmp_path / "r.json").read_bytes())
    assert found["choice"]["kind"] == "lexical" and set(found["kinds"]) == {"lexical", "single"}
    assert "best single" in result.output and (tmp_path / "a" / "r.html").read_text().startswith("<!doctype html>")
    for wrong, said in ((["--kinds", "lexica"], "lexical"), (["--objective", "speed"], "quality, aiq or apgr")):
        result = run.invoke(router_app, [*arguments, *wrong])
        assert result.exit_code == 2 and said in result.output


def pixels(png: bytes) -> tuple[int, int, set[bytes]]:
    """Width, height and the set of raw rows of a PNG: enough to tell a blank page from a drawn one."""
    width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
    data, at = b"", 8
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + size]
        at += 12 + size
    raw = zlib.decompress(data)
    step = len(raw) // height
    return width, height, {raw[i * step : (i + 1) * step] for i in range(height)}


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
def test_a_browser_shows_the_page(page: str, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    (tmp_path / "r.html").write_text(page)
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
    quiet += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    quiet += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,3600"]
    url = f"file://{tmp_path / 'r.html'}"
    shot = tmp_path / "r.png"
    subprocess.run([CHROMIUM, *quiet, f"--screenshot={shot}", url], check=True, capture_output=True, timeout=60)
    width, height, rows = pixels(shot.read_bytes())
    assert (width, height) == (1280, 3600)
    assert len(rows) > 800  # a blank page has one kind of row, an error page a few dozen
    found = subprocess.run(
        [CHROMIUM, *quiet, "--dump-dom", url], check=True, capture_output=True, text=True, timeout=60
    )
    assert found.stdout.count("<polyline") > 5 and "Cost against quality" in found.stdout
