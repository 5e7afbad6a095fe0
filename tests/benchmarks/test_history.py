"""The chart over the project's history: entries from records, and a page that stands alone."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from benchmarks import history
from benchmarks.common import RESULTS
from benchmarks.history import HistoryError, chart, entries, main, read_history, row_name

RECORD: dict[str, Any] = {
    "date": "2026-12-01",
    "machine": {
        "processor": "P",
        "instruction_set": "AVX2",
        "cores": 2,
        "gpu": None,
        "torch": "2.13",
    },
    "rows": [
        {
            "contender": name,
            "num_envs": num_envs,
            "replay_ratio": ratio,
            "env_steps_per_s": speed,
            "x_reference": speed / 500,
        }
        for name, num_envs, ratio, speed in (
            ("reference", 1, 64.0, 500.0),
            ("eager", 64, 1.0, 30_000.0),
            ("eager", 64, 64.0, 600.0),
        )
    ],
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results that is nobody's, without a browser."""
    monkeypatch.setattr(history, "RESULTS", tmp_path)
    monkeypatch.setattr(history, "write_png", lambda *_, **__: False)
    (tmp_path / "throughput.json").write_text(json.dumps(RECORD))
    return tmp_path


def run(monkeypatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["history", *flags])
    return main()


def test_the_committed_history_can_be_drawn():
    """It has the fields, begins with the first record, and each row is a line of the chart."""
    committed = read_history(RESULTS / "history.json")
    assert committed[0]["date"] == "2026-11-23"
    first = {entry["row"]: entry for entry in committed if entry["date"] == "2026-11-23"}
    assert round(first["eager, 64 envs"]["x_reference"]) == 57
    assert round(first["eager, 64 envs"]["env_steps_per_s"]) == 27_003
    assert round(first["eager, 1,024 envs"]["x_reference"]) == 454
    assert {trace.name for trace in chart(committed).data} == {e["row"] for e in committed}


def test_a_record_is_appended_once_under_its_label(results, monkeypatch, capsys):
    """What was there stays in front; the same label a second time is refused."""
    assert run(monkeypatch, "--add", "eager loop") == 0
    assert run(monkeypatch, "--add", "compiled loop") == 0
    kept = read_history(results / "history.json")
    assert [entry["change"] for entry in kept] == ["eager loop"] * 3 + ["compiled loop"] * 3
    assert kept[1] == {
        "date": "2026-12-01",
        "change": "eager loop",
        "machine": "P, AVX2, 2 cores, torch 2.13",
        "row": "eager, 64 envs",
        "env_steps_per_s": 30_000.0,
        "x_reference": 60.0,
        "replay_ratio": 1.0,
    }
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["entries"] == 6
    assert run(monkeypatch, "--add", "compiled loop") == 2
    assert capsys.readouterr().err == "error: --add 'compiled loop': must be a new label\n"
    assert read_history(results / "history.json") == kept


def test_the_page_opens_without_network(results, monkeypatch):
    """Plotly is in it, and nothing is fetched."""
    assert run(monkeypatch, "--add", "eager loop") == 0
    page = (results / "history.html").read_text()
    assert "eager, 64 envs, equal work" in page
    assert "<script src=" not in page
    assert len(page) > 1_000_000


def test_changes_keep_their_order_whatever_their_dates():
    """The x axis is the order of the list, not the alphabet's."""
    figure = chart(entries(RECORD, "b") + entries(RECORD, "a"))
    assert list(figure.layout.xaxis.categoryarray) == ["b<br>2026-12-01", "a<br>2026-12-01"]
    assert figure.data[1].y == (60.0, 60.0)


def test_rows_of_equal_work_are_told_apart():
    """A replay ratio of 64 is the usual one with one env, and equal work with 64."""
    one = {"contender": "jax", "num_envs": 1, "replay_ratio": 64.0}
    assert row_name(one) == "jax, 1 env"
    assert row_name({**one, "num_envs": 64}) == "jax, 64 envs, equal work"
    assert row_name({**one, "num_envs": 1024, "replay_ratio": 0.0625}) == "jax, 1,024 envs"
    members = {**one, "num_seeds": 132, "matmul_precision": "high"}
    assert row_name(members) == "jax, 132 x 1 env, TF32"


def test_rows_without_a_reference_are_no_history():
    """CartPole has none, and the chart is relative to it."""
    more = {**RECORD["rows"][0], "env_id": "CartPole-v1", "x_reference": None}
    record = {**RECORD, "rows": [*RECORD["rows"], more]}
    assert entries(record, "a") == entries(RECORD, "a")


def test_bad_input_is_one_clear_line(results, monkeypatch, capsys):
    """No file, a file of something else, an empty history: exit status 2, nothing written."""
    assert run(monkeypatch, "--add", "x", "--from", "nothing") == 2
    assert capsys.readouterr().err.startswith("error: --from nothing: ")
    (results / "other.json").write_text('{"rows": []}')
    assert run(monkeypatch, "--add", "x", "--from", "other") == 2
    assert "is no result of benchmarks.throughput" in capsys.readouterr().err
    assert run(monkeypatch) == 2
    assert "begin it with --add" in capsys.readouterr().err
    assert not (results / "history.json").exists()
    (results / "history.json").write_text('[{"date": 1}]')
    with pytest.raises(HistoryError, match="must be a list of objects"):
        read_history(results / "history.json")
