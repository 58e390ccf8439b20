from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signalbox.router.table import Table, TableError, fraction_of, from_columns, read_table, write_table
from tests.router.conftest import DATA


def columns(**changes: list[object]) -> dict[str, list[object]]:
    base: dict[str, list[object]] = {
        "prompt_id": ["a", "b", "c"],
        "prompt": ["one", "two", "three"],
        "source": ["s"] * 3,
        "task": ["t", "t", "u"],
        "score:gemma": [0.5, 1.0, 0.0],
        "score:smollm2": [0.25, None, 1.0],
    }
    return base | changes


def test_reads_what_the_format_says() -> None:
    table = from_columns(columns(in_tok=[3, 4, 5], **{"cost:gemma": [1e-6, 2e-6, 0.0], "out_tok:gemma": [1, 2, 3]}))
    assert table.models == ("gemma", "smollm2")
    np.testing.assert_array_equal(table.measures["in_tok"], [[3, 3], [4, 4], [5, 5]])
    assert np.isnan(table.score[1, 1]) and np.isnan(table.measures["cost"][:, 1]).all()
    assert table.complete().prompt_id == ["a", "c"]
    assert table.pool(["smollm2"]).score[2, 0] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score:gemma": [0.5, 1.3, 0.0]}, r"column score:gemma, row 2: 1\.3 is not in \[0, 1\]"),
        ({"score:gemma": [0.5, "good", 0.0]}, "column score:gemma, row 2: 'good' is not a number"),
        ({"loss:gemma": [0.5, -1.0, 0.0]}, "column loss:gemma, row 2: -1 is not a finite number of bits per byte"),
        ({"loss:gemma": [0.5, 1.0, float("inf")]}, "column loss:gemma, row 3: inf is not"),
        ({"cost:gemma": [-0.1, 0, 0]}, "column cost:gemma, row 1: -0.1 is not"),
        ({"cost:gpt": [0.1, 0, 0]}, "column cost:gpt has no column score:gpt or loss:gpt"),
        ({"prompt_id": ["a", "b", "a"]}, "column prompt_id, row 3: 'a' stands in row 1 already"),
        ({"prompt": ["one", "", "three"]}, "column prompt, row 2: it is empty"),
        ({"prompt": ["one", 2, "three"]}, "column prompt, row 2: 2 is not text"),
        ({"prompt": [], "prompt_id": []}, "it has no rows"),
    ],
)
def test_an_error_names_column_and_row(change: dict[str, list[object]], message: str) -> None:
    with pytest.raises(TableError, match=message):
        from_columns(columns(**change))


def test_a_table_without_labels_or_prompts_is_refused() -> None:
    with pytest.raises(TableError, match="no model"):
        from_columns({"prompt_id": ["a"], "prompt": ["x"]})
    with pytest.raises(TableError, match="column prompt is missing"):
        from_columns({"prompt_id": ["a"], "score:m": [1.0]})
    with pytest.raises(TableError, match="no column for gema; did you mean gemma"):
        from_columns(columns()).pool(["gema"])
    with pytest.raises(TableError, match="named twice"):
        from_columns(columns()).pool(["gemma", "gemma"])


def test_quality_comes_from_the_loss_where_nobody_judged() -> None:
    table = from_columns({"prompt_id": ["a"], "prompt": ["x"], "loss:m": [1.0], "loss:n": [2.0]})
    np.testing.assert_allclose(table.score, [[0.5, 0.25]])
    assert table.loss is not None


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_every_format_gives_the_same_table(tmp_path: Path, suffix: str) -> None:
    table = from_columns(
        columns(
            prompt=['a "quoted", thing', "two\nlines\r\nthree", "null"],
            prompt_id=["007", "b", "c"],
            reference=["r", "", "ünï"],
            text=["", "y", "z"],
            **{"loss:gemma": [0.1, 1 / 3, 2.5], "ms:gemma": [1.5, None, 3], "in_tok:gemma": [5, 6, None]},
        )
    )
    path = tmp_path / "sub" / f"table.{suffix}"
    write_table(table, path)
    again = read_table(path)
    assert again.prompt == table.prompt and again.prompt_id == table.prompt_id
    assert again.reference == table.reference and again.text == table.text and again.task == table.task
    assert again.models == table.models and again.measures.keys() == table.measures.keys()
    for kind, values in table.measures.items():
        np.testing.assert_allclose(again.measures[kind], values, err_msg=kind)
    assert again.sha256 == table.sha256
    assert [p.name for p in path.parent.iterdir()] == [path.name]


PROMPTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30)
CELLS = st.one_of(st.none(), st.floats(0, 1))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(PROMPTS, CELLS, CELLS), min_size=1, max_size=8), st.sampled_from(["csv", "jsonl", "parquet"]))
def test_any_table_survives_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, float | None, float | None]], suffix: str
) -> None:
    table = from_columns(
        {
            "prompt_id": [str(i) for i in range(len(rows))],
            "prompt": [r[0] for r in rows],
            "score:a": [r[1] for r in rows],
            "score:b": [r[2] for r in rows],
        }
    )
    path = tmp_path_factory.mktemp("t") / f"t.{suffix}"
    write_table(table, path)
    again = read_table(path)
    assert again.prompt == table.prompt
    np.testing.assert_array_equal(again.score, table.score)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no such file"):
        read_table(tmp_path / "absent.parquet")
    (tmp_path / "t.xlsx").write_bytes(b"x")
    with pytest.raises(TableError, match="unknown format"):
        read_table(tmp_path / "t.xlsx")
    (tmp_path / "t.parquet").write_bytes(b"not parquet")
    with pytest.raises(TableError, match="not a readable parquet"):
        read_table(tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_bytes(orjson.dumps({"prompt_id": "a", "prompt": "x", "score:m": 1}) + b"\n{oops\n")
    with pytest.raises(TableError, match=r"t\.jsonl: line 2 is not JSON"):
        read_table(tmp_path / "t.jsonl")


def test_jsonl_rows_may_lack_cells(tmp_path: Path) -> None:
    rows = [{"prompt_id": 1, "prompt": "x", "score:m": 1}, {"prompt_id": 2, "prompt": "y", "score:n": 0.5}]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    table = read_table(tmp_path / "t.jsonl")
    assert table.prompt_id == ["1", "2"]
    np.testing.assert_array_equal(np.isnan(table.score), [[False, True], [True, False]])


def test_the_split_is_by_hash_and_about_as_large_as_asked() -> None:
    table = from_columns(
        {"prompt_id": [f"id{i}" for i in range(2000)], "prompt": ["x"] * 2000, "score:m": [0.5] * 2000}
    )
    held = table.held_out(0.2)
    assert 0.17 < held.mean() < 0.23
    shuffled = table.rows(np.random.default_rng(0).permutation(2000))
    assert {i for i, h in zip(shuffled.prompt_id, shuffled.held_out(0.2), strict=True) if h} == {
        i for i, h in zip(table.prompt_id, held, strict=True) if h
    }
    assert (held & ~table.held_out(0.5)).sum() == 0  # a smaller split is part of a larger one
    assert fraction_of("id1") == fraction_of("id1") != fraction_of("id1", "salt")


def test_the_hash_sees_a_changed_label() -> None:
    table, other = from_columns(columns()), from_columns(columns(**{"score:gemma": [0.5, 1.0, 0.1]}))
    assert table.sha256 != other.sha256
    assert isinstance(table, Table)


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent")
@pytest.mark.parametrize(("name", "models"), [("mmlu_pro", 29), ("routellm_pair", 2)])
def test_the_shared_tables_are_valid(name: str, models: int) -> None:
    table = read_table(DATA / "routing" / f"{name}.parquet")
    assert len(table.models) == models and len(table.complete()) > 9000
    assert len(table) == pa.parquet.read_metadata(DATA / "routing" / f"{name}.parquet").num_rows
