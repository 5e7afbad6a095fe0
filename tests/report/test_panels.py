"""Figures of the report: what they draw is what was recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from dqn_fast.report.figures import MAX_POINTS, Panel, group_runs, make_clocks
from dqn_fast.report.panels import make_panels
from dqn_fast.report.recorded import RecordedRun, read_run
from dqn_fast.report.statistics import bootstrap_mean_interval, moving_average
from tests.report.recorded_runs import OPTIMAL_RETURN, Q_STAR, change_json, write_run


def drawn(runs: Sequence[RecordedRun]) -> dict[str, Panel]:
    return {panel.key: panel for panel in make_panels(group_runs(runs))}


def figure(panel: Panel) -> go.Figure:
    assert panel.figure is not None
    return panel.figure


def trace(panel: Panel, name: str) -> go.Scatter:
    (found,) = (t for t in figure(panel).data if t.name == name and t.fill is None)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    return read_run(write_run(tmp_path_factory.mktemp("runs") / "one"))


@pytest.fixture(scope="module")
def one(run: RecordedRun) -> dict[str, Panel]:
    return drawn([run])


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    return read_run(write_run(tmp_path_factory.mktemp("runs") / "crowd", members=5))


def test_everything_is_drawn(one: dict[str, Panel]) -> None:
    """A run with all records has all figures, each with a title and axes with titles."""
    for panel in one.values():
        assert panel.title
        assert panel.caption
        layout = figure(panel).layout
        assert layout.xaxis.title.text
        assert layout.yaxis.title.text
    assert list(one) == [
        "return", "q-error", "q-start", "q-table", "q-error-table", "over-estimation", "td-loss",
        "td-errors", "td-error-sample", "dead-units", "policy-changes", "epsilon", "visits",
        "env-steps",
    ]  # fmt: skip


def test_returns(run: RecordedRun, one: dict[str, Panel]) -> None:
    """Episodes, their moving average over 20, evaluations and the optimum are the recorded ones."""
    episodes = run.episodes
    points = trace(one["return"], "training episode")
    assert list(points.x) == episodes["global_step"].tolist()
    np.testing.assert_allclose(points.y, episodes["episode_return"], rtol=1e-6)
    average = trace(one["return"], "moving average over 20 episodes")
    np.testing.assert_allclose(average.y, moving_average(episodes["episode_return"], 20), rtol=1e-6)
    evaluation = trace(one["return"], "greedy evaluation")
    assert list(evaluation.x) == list(range(4_000, 40_001, 4_000))
    np.testing.assert_allclose(evaluation.y, run.metrics["eval/return_mean"][3::4, 0], rtol=1e-6)
    np.testing.assert_allclose(evaluation.error_y.array, 0.02)
    optimum = trace(one["return"], "optimal policy (exact)")
    np.testing.assert_allclose(optimum.y, OPTIMAL_RETURN, rtol=1e-6)
    assert optimum.line.dash == "dash"


def test_a_metric(run: RecordedRun, one: dict[str, Panel]) -> None:
    """A single run's curve is its log points; the loss has a logarithmic axis."""
    (loss,) = figure(one["td-loss"]).data
    assert list(loss.x) == run.global_step.tolist()
    np.testing.assert_allclose(loss.y, run.metrics["losses/td_loss"][:, 0], rtol=1e-6)
    assert figure(one["td-loss"]).layout.yaxis.type == "log"


def test_start_values_meet_the_exact_ones(one: dict[str, Panel]) -> None:
    """The probed state is recognised as state 0, and its exact values are dashed."""
    for action in (0, 1):
        exact = trace(one["q-start"], f"exact, action {action}")
        np.testing.assert_allclose(exact.y, Q_STAR[0, action], rtol=1e-6)
        learned = trace(one["q-start"], f"action {action}")
        assert exact.line.color == learned.line.color
        assert abs(learned.y[-1] - exact.y[-1]) < 0.1


def test_a_probe_that_is_no_known_state(run: RecordedRun) -> None:
    """No exact values are drawn for a state that is not recognised."""
    metrics = {**run.metrics, "q/probe_0": run.metrics["q/probe_0"] + 0.5}
    changed = RecordedRun(**{**vars(run), "metrics": metrics})
    panel = drawn([changed])["q-start"]
    assert len(figure(panel).data) == 2
    assert "The exact values are not known." in panel.notes


def test_q_tables(run: RecordedRun, one: dict[str, Panel]) -> None:
    """Q and Q - Q* of every state that is not terminal; colours are centred on 0."""
    q = run.diagnostics["q_values"][-1, 0].astype(float)
    heat, marks = figure(one["q-table"]).data
    np.testing.assert_allclose(heat.z[:, :14], q[:14].T, rtol=1e-6)
    assert np.isnan(heat.z[:, 14]).all()
    assert list(marks.x) == list(range(14))
    assert list(marks.y) == q[:14].argmax(1).tolist()
    error = figure(one["q-error-table"]).data[0]
    np.testing.assert_allclose(error.z[:, :14], (q - Q_STAR)[:14].T, atol=1e-6)
    assert error.zmin == -error.zmax


def test_wrong_actions_are_marked(run: RecordedRun) -> None:
    """Where the greedy action is not a best one there is a cross, and the caption counts them."""
    q_values = run.diagnostics["q_values"].copy()
    q_values[-1, 0, 3, 0] = 2.0
    changed = RecordedRun(**{**vars(run), "diagnostics": {**run.diagnostics, "q_values": q_values}})
    panel = drawn([changed])["q-error-table"]
    crosses = figure(panel).data[1]
    assert (list(crosses.x), list(crosses.y)) == ([3], [0])
    assert "1 of 14 states" in panel.caption


def shaped(run: RecordedRun, *shape: int) -> Panel | None:
    config = {**run.config, "derived": {"grid_shape": list(shape)}}
    return drawn([RecordedRun(**{**vars(run), "config": config})]).get("value-grid")


def test_values_stand_where_the_states_are(run: RecordedRun, one: dict[str, Panel]) -> None:
    """A grid's values are in its rows, the first on top, with greedy actions in the cells; a last
    state that ends episodes needs no place."""
    assert "value-grid" not in one
    q = run.diagnostics["q_values"][-1, 0]
    panel = shaped(run, 3, 5)
    assert panel is not None
    (cells,) = figure(panel).data
    best = q.max(1)
    best[14] = np.nan  # terminal
    np.testing.assert_allclose(cells.z, best.reshape(3, 5), rtol=1e-6)
    assert cells.text[1][2] == str(q[7].argmax())
    assert cells.text[2][4] == ""
    assert figure(panel).layout.yaxis.range == (2.5, -0.5)
    panel = shaped(run, 2, 7)
    assert panel is not None
    np.testing.assert_allclose(figure(panel).data[0].z, best[:14].reshape(2, 7), rtol=1e-6)
    panel = shaped(run, 3, 4)
    assert panel is not None
    assert panel.figure is None
    assert panel.notes == ["15 states do not fill 3 rows of 4, or are too many to draw."]
    assert shaped(run, 15) is None


def test_visits(run: RecordedRun, one: dict[str, Panel]) -> None:
    """Each column holds the shares of its stretch, between its first and its last step."""
    (heat,) = figure(one["visits"]).data
    share = 10.0 ** np.asarray(heat.z, float)
    np.testing.assert_allclose(np.nansum(share, 0), 1.0, rtol=1e-5)
    counts = run.diagnostics["visits"][:, 0]
    np.testing.assert_allclose(
        share[:14], (counts / counts.sum(1, keepdims=True)).T[:14], rtol=1e-5
    )
    assert np.isnan(share[14]).all()
    assert list(heat.x) == list(range(0, 40_001, 1_000))


def test_td_errors(run: RecordedRun, one: dict[str, Panel]) -> None:
    """The fan's outermost edges are the extremes, its line the median, the bars all errors."""
    fan = figure(one["td-errors"]).data
    quantiles = run.diagnostics["td_error_quantiles"][:, 0]
    np.testing.assert_allclose(fan[0].y, quantiles[:, 0], rtol=1e-6)
    np.testing.assert_allclose(fan[1].y, quantiles[:, -1], rtol=1e-6)
    np.testing.assert_allclose(fan[-1].y, quantiles[:, 4], rtol=1e-6)
    assert [t.name for t in fan if t.showlegend is not False] == [
        "all",
        "98 %",
        "90 %",
        "50 %",
        "median",
    ]
    (bars,) = figure(one["td-error-sample"]).data
    assert sum(bars.y) == 512


def test_mean_and_interval_of_members(crowd: RecordedRun) -> None:
    """Several members: their mean, its bootstrap interval, and every one of them."""
    panel = drawn([crowd])["td-loss"]
    losses = crowd.metrics["losses/td_loss"]
    np.testing.assert_allclose(trace(panel, "mean of 5").y, losses.mean(1), rtol=1e-5)
    single = trace(panel, "single agents")
    for member in range(5):
        np.testing.assert_allclose(single.y[41 * member :][:40], losses[:, member], rtol=1e-5)
    assert np.isnan(single.y[40::41]).all()
    low, high = bootstrap_mean_interval(losses.T)
    edges = [t.y for t in figure(panel).data if t.name == "95 % interval"]
    np.testing.assert_allclose(edges, [low, high], rtol=1e-5)


def test_members_are_not_averaged_away_in_tables(crowd: RecordedRun) -> None:
    """Errors of opposite sign do not cancel: each cell shows the largest error of any member."""
    heat = figure(drawn([crowd])["q-error-table"]).data[0]
    error = crowd.diagnostics["q_values"][-1] - Q_STAR
    np.testing.assert_allclose(np.abs(heat.z)[:, :14], np.abs(error).max(0)[:14].T, atol=1e-6)


def test_experiments_are_compared_by_environment_and_name(tmp_path: Path) -> None:
    """Runs of one environment and name are one group; each group has its own curve and tables."""
    paths = [
        write_run(tmp_path / f"{name}-{seed}", name=name, seed=seed, log_points=12)
        for name, seed in (("a", 0), ("a", 1), ("b", 0))
    ]
    paths.append(write_run(tmp_path / "other", env_id="Other-v0", name="a", tabular=False))
    runs = [read_run(path) for path in paths]
    groups = group_runs(runs)
    assert [(g.label, len(g.runs)) for g in groups] == [
        ("LineWorld-v0 · a", 2),
        ("LineWorld-v0 · b", 1),
        ("Other-v0 · a", 1),
    ]
    made = drawn(runs)
    names = [t.name for t in figure(made["evaluation"]).data if t.showlegend is not False]
    assert names == [
        "LineWorld-v0 · a (mean of 2)",
        "LineWorld-v0 · b",
        "Other-v0 · a",
        "optimal: LineWorld-v0",
    ]
    assert made["q-table-0"].figure is not None
    assert made["q-table-2"].figure is None
    assert (
        len({t.line.color for t in figure(made["td-loss"]).data if t.showlegend is not False}) == 3
    )


def test_a_comparison_draws_whoever_has_the_record(tmp_path: Path) -> None:
    """If the first experiment lacks a record, the others are still drawn."""
    paths = [write_run(tmp_path / name, name=name, log_points=8) for name in "ab"]
    (paths[0] / "metrics.jsonl").unlink()
    (paths[0] / "diagnostics.npz").unlink()
    made = drawn([read_run(path) for path in paths])
    for key in ("q-start", "over-estimation", "td-loss", "q-table-1"):
        assert made[key].figure is not None
    assert made["q-table-0"].figure is None


def test_tables_of_many_experiments_are_limited(tmp_path: Path) -> None:
    """Nine experiments have one curve each, eight have tables, and the page says so."""
    made = drawn([read_run(write_run(tmp_path / n, name=n, log_points=8)) for n in "abcdefghi"])
    assert len(figure(made["td-loss"]).data) == 9
    assert len([key for key, p in made.items() if key.startswith("q-table") and p.figure]) == 8
    assert "8 of 9 experiments" in made["q-table-more"].notes[0]


def test_what_was_not_recorded_is_left_out_with_a_reason(tmp_path: Path) -> None:
    """Without tables no heatmap, without episodes no points; each says what is missing."""
    path = write_run(tmp_path / "run", tabular=False)
    (path / "episodes.npz").unlink()
    made = drawn([read_run(path)])
    assert made["q-table"].figure is None
    assert "tabular" in " ".join(made["q-table"].notes)
    assert made["return"].figure is not None  # evaluations are there
    assert "No finished training episode was recorded." in made["return"].notes
    (path / "metrics.jsonl").unlink()
    (path / "diagnostics.npz").unlink()
    change_json(path / "summary.json", optimal_return=0.5)  # alone, a known optimum is no figure
    left_out = drawn([read_run(path)])
    assert [panel.key for panel in left_out.values() if panel.figure] == []
    assert all(panel.notes for panel in left_out.values())


def test_long_curves_are_thinned_and_say_so(tmp_path: Path) -> None:
    """Spikes survive, few points are drawn, and the note has both numbers."""
    path = write_run(tmp_path / "run", log_points=8_000, episodes=50_000, tabular=False)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[4_321])
    lines[4_321] = json.dumps(row | {"losses/td_loss": 1e6})
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    made = drawn([read_run(path)])
    faint, strong = figure(made["td-loss"]).data
    assert len(faint.x) <= MAX_POINTS + 2
    assert max(faint.y) == 1e6
    assert len(strong.x) == 500
    assert "of 8,000 points" in made["td-loss"].notes[0]
    assert f"{len(faint.x):,} in total" in made["td-loss"].notes[0]
    assert any("of 50,000 episodes" in note for note in made["return"].notes)
    episodes = read_run(path).episodes["episode_return"]
    points = trace(made["return"], "training episode").y
    assert len(points) <= MAX_POINTS + 2
    np.testing.assert_allclose([points.min(), points.max()], [episodes.min(), episodes.max()])


def test_the_fan_keeps_extremes(tmp_path: Path) -> None:
    """Of many log points the fan draws few, with the largest and smallest errors of all."""
    path = write_run(tmp_path / "run", log_points=2_000, tabular=False)
    panel = drawn([read_run(path)])["td-errors"]
    quantiles = read_run(path).diagnostics["td_error_quantiles"]
    fan = figure(panel).data
    assert len(fan[0].x) == 500
    assert fan[0].y.min() == pytest.approx(quantiles.min())
    assert fan[1].y.max() == pytest.approx(quantiles.max())
    assert "2,000 log points" in panel.notes[0]


def test_clocks(run: RecordedRun, crowd: RecordedRun) -> None:
    """A run's clock is its wall time; a group's is the mean over its runs at equal steps."""
    slow = RecordedRun(**{**vars(run), "wall_s": 3 * run.wall_s})
    mean, first, second = make_clocks(group_runs([run, slow]))
    np.testing.assert_allclose(
        np.interp(run.global_step, first["step"], first["wall"]), run.wall_s, atol=1e-4
    )
    np.testing.assert_allclose(second["wall"], 3 * np.array(first["wall"]), atol=1e-3)
    half = np.interp(20_000, mean["step"], mean["wall"])
    assert half == pytest.approx(2 * run.wall_s[19], rel=1e-3)
    for group in group_runs([run, crowd]):
        for t in (t for p in make_panels([group]) if p.figure for t in p.figure.data if t.meta):
            assert group.clock <= t.meta["clock"] <= group.clock + len(group.runs)


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    """Plotly reads a little HTML in names: what a run is called stays text."""
    runs = [
        read_run(write_run(tmp_path / str(i), name=f"<b>{i}</b>", log_points=12)) for i in (0, 1)
    ]
    names = [t.name for t in figure(drawn(runs)["td-loss"]).data]
    assert names == ["LineWorld-v0 · &lt;b&gt;0&lt;/b&gt;", "LineWorld-v0 · &lt;b&gt;1&lt;/b&gt;"]
