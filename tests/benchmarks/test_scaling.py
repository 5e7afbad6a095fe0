"""The scaling benchmark: each row says what it is, and memory is what replay promises."""

from __future__ import annotations

import pytest

from benchmarks import scaling
from benchmarks.scaling import (
    AXES,
    CAPACITIES,
    QUICK_AXES,
    Point,
    ScalingArgs,
    curves,
    measure_memory,
    measure_time,
)

AROUND = {"num_envs": (1, 64, 4096), "batch_size": (16, 64), "chunk_steps": (4, 32)}


@pytest.fixture(scope="module")
def rows():
    return measure_time(AROUND, ScalingArgs(repeats=3, device="cpu"), seconds=0.02)


@pytest.fixture(scope="module")
def memory():
    return measure_memory("cpu")


def test_the_axes_span_what_is_claimed():
    """N to 2^20, B to 4096, width to 1024, K to 64, all through the same middle."""
    assert {axis: (values[0], values[-1]) for axis, values in AXES.items()} == {
        "num_envs": (1, 2**20),
        "batch_size": (16, 4096),
        "hidden_size": (32, 1024),
        "chunk_steps": (1, 64),
    }
    for axis, values in [*AXES.items(), *QUICK_AXES.items()]:
        assert getattr(Point(), axis) in values
        assert list(values) == sorted(values)


def test_rows_carry_sizes_and_replay_ratio(rows):
    """One gradient step per vector step, as asked for, whatever the sizes."""
    assert [(row["axis"], row["value"]) for row in rows] == [
        (axis, value) for axis, values in AROUND.items() for value in values
    ]
    for row in rows:
        assert row[row["axis"]] == row["value"]
        assert row["engine"] == "eager"
        assert row["replay_ratio"] == row["batch_size"] / row["num_envs"]
        assert row["us_per_step_min"] <= row["us_per_step"] <= row["us_per_step_max"]
        assert row["updates_per_s"] * row["us_per_step"] == pytest.approx(1e6)
        assert row["env_steps_per_s"] == pytest.approx(row["updates_per_s"] * row["num_envs"])


def test_a_point_on_several_axes_is_one_measurement(rows):
    """The middle of all axes: 64 envs, batch 64, 128x128, chunks of 32."""
    middle = [row for row in rows if row["value"] == getattr(Point(), row["axis"])]
    assert len(middle) == 3
    assert len({row["us_per_step"] for row in middle}) == 1


def test_rows_name_the_engine_that_ran():
    """A generated program of its own for each point."""
    args = ScalingArgs(engine="fused", repeats=1, device="cpu")
    rows = measure_time({"num_envs": (4,), "batch_size": (8,)}, args, seconds=0.01)
    assert [row["engine"] for row in rows] == ["fused", "fused"]


def test_env_copies_share_the_cost_of_a_step(rows):
    """64 times the copies do not take 64 times the time."""
    one, many, _ = (row["us_per_step_min"] for row in rows if row["axis"] == "num_envs")
    assert many < 8 * one


def test_a_million_transitions_of_line_world_take_8_mb(memory):
    """By the tensors, and by the resident set of a fresh process."""
    (row,) = [
        row for row in memory if (row["env_id"], row["capacity"]) == ("LineWorld-v0", 1_000_000)
    ]
    assert row["bytes_per_transition"] <= 8
    assert row["mb"] <= 8.0
    assert row["measured_mb"] == pytest.approx(row["mb"], rel=0.05)


def test_memory_is_the_transitions_and_little_else(memory):
    """At every capacity, for every environment."""
    assert [row["capacity"] for row in memory] == [*CAPACITIES, *CAPACITIES]
    for row in memory:
        assert row["mb"] == row["bytes_per_transition"] * row["capacity"] / 1e6
        assert row["measured_bytes_per_transition"] < 1.5 * row["bytes_per_transition"]
        assert row["measured_bytes_per_transition"] > 0.8 * row["bytes_per_transition"]


def test_the_page_opens_without_network(rows, memory, tmp_path):
    """One file with the curves and what draws them."""
    figure = curves(rows, memory)
    assert len(figure.data) == 5 + 4
    page = tmp_path / "scaling.html"
    figure.write_html(page, include_plotlyjs=True)
    text = page.read_text()
    assert len(text) > 10**6
    assert "<script src=" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--cores", "4096"], "--cores 4096: must be among "),
        (["--num-threads", "0"], "--num-threads 0: must be at least 1"),
        (["--seconds", "-1"], "--seconds -1.0: must be above 0 and finite"),
        (["--html", "nowhere/a.html"], "--html nowhere/a.html: must be in a folder that exists"),
        (["--device", "abacus"], "--device abacus: not available here"),
    ],
)
def test_bad_flags_are_one_clear_line(monkeypatch, capsys, flags, message):
    """Exit status 2 and one line that names the flag."""
    monkeypatch.setattr("sys.argv", ["scaling", *flags])
    assert scaling.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
