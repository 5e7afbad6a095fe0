"""Health checks: each speaks up, with the number, for the run that it is about, and only then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dqn_fast.report.health import Finding, check_health
from dqn_fast.report.recorded import RecordedRun, read_run
from tests.report.recorded_runs import write_run

ENDED = "The run reached its end"
STEPS = "Gradient steps are taken"
LOSS = "The loss stays bounded"
TARGETS = "Targets are synchronised"
EXPLORATION = "Exploration comes and goes"
REPLAY = "Replay holds whole episodes"
EVALUATION = "Evaluation improves"
PREDICTION = "Predictions meet reality"
UNITS = "Hidden units are alive"
POLICY = "The greedy policy changes"


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    """A run of one member that learned."""
    return read_run(write_run(tmp_path_factory.mktemp("runs") / "healthy"))


def find(run: RecordedRun, check: str) -> Finding:
    (finding,) = (finding for finding in check_health(run) if finding.check == check)
    return finding


def with_metrics(run: RecordedRun, **metrics: Any) -> RecordedRun:
    """The run with other values at its log points, by the part of the name after the slash."""
    full = {name.split("/")[1]: name for name in run.metrics}
    columns = {
        full[name]: np.broadcast_to(np.asarray(values, float), (len(run.global_step),))[:, None]
        for name, values in metrics.items()
    }
    return replace(run, metrics={**run.metrics, **columns})


def with_settings(run: RecordedRun, **settings: Any) -> RecordedRun:
    return replace(run, config={**run.config, "args": {**run.part("args"), **settings}})


def with_summary(run: RecordedRun, **entries: Any) -> RecordedRun:
    return replace(run, summary={**run.summary, **entries})


def with_diagnostics(run: RecordedRun, **arrays: Any) -> RecordedRun:
    return replace(run, diagnostics={**run.diagnostics, **arrays})


def test_a_healthy_run_is_ok(healthy: RecordedRun) -> None:
    """Every check is ok, says what it saw, and gives no advice."""
    findings = check_health(healthy)
    assert [finding.status for finding in findings] == ["ok"] * 10
    assert all(finding.observed and not finding.advice for finding in findings)


def test_an_empty_record_is_not_known(healthy: RecordedRun) -> None:
    """Without any record the checks say that they do not know; only the end is remarked on."""
    nothing = np.empty(0)
    run = RecordedRun(healthy.path, {}, {}, nothing, nothing, {}, None, {}, {}, ())
    statuses = {finding.check: finding.status for finding in check_health(run)}
    assert statuses.pop(ENDED) == "warning"
    assert set(statuses.values()) == {"not known"}


@pytest.mark.parametrize(
    ("status", "expected", "words"),
    [
        ("stopped", "warning", "stopped"),
        ("failed: no memory", "problem", "no memory"),
        (None, "warning", "summary.json was not written"),
    ],
)
def test_a_run_that_did_not_end(
    healthy: RecordedRun, status: str | None, expected: str, words: str
) -> None:
    """Stopped, failed and killed runs are told apart, and the last step is named."""
    run = with_summary(healthy, status=status) if status else replace(healthy, summary={})
    finding = find(run, ENDED)
    assert finding.status == expected
    assert words in finding.observed
    assert "40,000 of 40,000" in finding.observed
    assert finding.advice


def test_no_gradient_step(healthy: RecordedRun) -> None:
    """A run without gradient steps has a problem, and its targets are not judged."""
    run = with_settings(with_summary(healthy, num_updates=0), learning_starts=50_000)
    finding = find(run, STEPS)
    assert finding.status == "problem"
    assert "0 gradient steps" in finding.observed
    assert "50,000" in finding.advice
    assert find(run, TARGETS).status == "not known"


def test_replay_ratio_near_zero(healthy: RecordedRun) -> None:
    """62 steps of 64 transitions in 40 000 are a ratio of 0.0992: too low; 63 are enough."""
    finding = find(with_summary(healthy, num_updates=62), STEPS)
    assert finding.status == "warning"
    assert "0.0992" in finding.observed
    assert find(with_summary(healthy, num_updates=63), STEPS).status == "ok"


def test_a_killed_run_shows_whether_it_learned(healthy: RecordedRun) -> None:
    """Without a summary, the log tells whether gradient steps were taken."""
    killed = replace(healthy, summary={})
    assert find(killed, STEPS).status == "ok"
    metrics = {k: v for k, v in healthy.metrics.items() if not k.startswith("losses/")}
    assert find(replace(killed, metrics=metrics), STEPS).status == "problem"


def test_loss_not_finite(healthy: RecordedRun) -> None:
    """A loss that was not finite is a problem, wherever it was noted."""
    finding = find(replace(healthy, loss_not_finite_at=7_000), LOSS)
    assert finding.status == "problem"
    assert "7,000" in finding.observed
    status = "failed: loss or gradient not finite in gradient step 9"
    assert find(with_summary(healthy, status=status), LOSS).status == "problem"


def test_loss_grows(healthy: RecordedRun) -> None:
    """Growing loss is a warning, and a problem with values beyond every return."""
    growing = with_metrics(healthy, td_loss=np.geomspace(1e-3, 1.0, 40))
    finding = find(growing, LOSS)
    assert finding.status == "warning"
    assert "0.00187" in finding.observed
    finding = find(with_metrics(growing, q_value=50.0), LOSS)
    assert finding.status == "problem"
    assert "50" in finding.observed
    rises_and_falls = np.concatenate([np.geomspace(1e-3, 1.0, 20), np.geomspace(1.0, 1e-3, 20)])
    assert find(with_metrics(healthy, td_loss=rises_and_falls), LOSS).status == "ok"


def test_targets_never_synchronised(healthy: RecordedRun) -> None:
    """Counted, or by the settings where nothing was counted: interval 0 means never."""
    zeros = np.zeros_like(healthy.diagnostics["num_syncs"])
    assert find(with_diagnostics(healthy, num_syncs=zeros), TARGETS).status == "problem"
    bare = replace(healthy, diagnostics={})
    assert find(bare, TARGETS).status == "ok"
    finding = find(with_settings(bare, target_update_interval=0), TARGETS)
    assert finding.status == "problem"
    assert "By the settings" in finding.observed


def test_targets_lag(healthy: RecordedRun) -> None:
    """Ten synchronisations with tau 0.02 replace 18 % of the target: too few."""
    few = with_diagnostics(healthy, num_syncs=np.full(40, 10))
    finding = find(few, TARGETS)
    assert finding.status == "warning"
    assert "18%" in finding.observed
    assert find(with_settings(few, tau=1.0), TARGETS).status == "ok"


@pytest.mark.parametrize(("low", "expected"), [(0.05, "ok"), (0.2, "warning"), (0.9, "problem")])
def test_epsilon_never_low(healthy: RecordedRun, low: float, expected: str) -> None:
    """The lowest epsilon decides, and is named."""
    finding = find(with_metrics(healthy, epsilon=np.linspace(1.0, low, 40)), EXPLORATION)
    assert finding.status == expected
    assert f"{low:g}" in finding.observed


def test_no_exploration(healthy: RecordedRun) -> None:
    """An agent that never tries anything is warned about."""
    assert find(with_metrics(healthy, epsilon=0.0), EXPLORATION).status == "warning"


@pytest.mark.parametrize(("size", "expected"), [(19, "problem"), (99, "warning"), (100, "ok")])
def test_buffer_smaller_than_an_episode(healthy: RecordedRun, size: int, expected: str) -> None:
    """Episodes take 20 steps; without episodes the time limit of 40 counts."""
    finding = find(with_settings(healthy, buffer_size=size), REPLAY)
    assert finding.status == expected
    assert "20.0 steps" in finding.observed
    no_episode = with_settings(replace(healthy, episodes={}), buffer_size=39)
    assert find(no_episode, REPLAY).status == "problem"


def test_evaluation_never_improved(healthy: RecordedRun) -> None:
    """No gain over the first episodes is a problem, unless the optimum is known and reached."""
    returns = np.full_like(healthy.episodes["episode_return"], -0.4)
    flat = replace(
        with_metrics(healthy, return_mean=-0.4),
        episodes={**healthy.episodes, "episode_return": returns},
    )
    finding = find(flat, EVALUATION)
    assert finding.status == "problem"
    assert "-0.4" in finding.observed
    assert "0.8451" in finding.observed
    assert find(with_summary(flat, optimal_return=-0.4), EVALUATION).status == "ok"


def test_evaluation_forgot(healthy: RecordedRun) -> None:
    """A run that learned and lost it again is warned about, with both numbers."""
    curve = np.full(40, np.nan)
    curve[3::4] = [-0.4, 0.0, 0.5, 0.8, 0.84, 0.84, 0.8, 0.3, 0.0, -0.3]
    finding = find(with_metrics(healthy, return_mean=curve), EVALUATION)
    assert finding.status == "warning"
    assert "0.84 in the best" in finding.observed
    assert "best.pt" in finding.advice


def test_evaluation_of_the_worst_member(tmp_path: Path) -> None:
    """One member of three that does not learn is found and named."""
    run = read_run(write_run(tmp_path / "run", members=3))
    returns = run.metrics["eval/return_mean"].copy()
    returns[np.isfinite(returns[:, 2]), 2] = -0.4
    finding = find(replace(run, metrics={**run.metrics, "eval/return_mean": returns}), EVALUATION)
    assert finding.status == "problem"
    assert "Member 2" in finding.observed


@pytest.mark.parametrize(
    ("predicted", "expected"), [(0.8, "ok"), (0.2, "ok"), (1.0, "warning"), (3.0, "problem")]
)
def test_over_estimation(healthy: RecordedRun, predicted: float, expected: str) -> None:
    """Predictions far above the realised 0.7 are remarked on, those below are not."""
    run = with_metrics(healthy, q_start=predicted, discounted_return=0.7)
    finding = find(run, PREDICTION)
    assert finding.status == expected
    assert f"{predicted:g}" in finding.observed


@pytest.mark.parametrize(("share", "expected"), [(0.5, "ok"), (0.7, "warning"), (1.0, "problem")])
def test_dead_units(healthy: RecordedRun, share: float, expected: str) -> None:
    """The share at the end decides."""
    dead = np.linspace(0, share, 40)[:, None]
    finding = find(with_diagnostics(healthy, dead_units=dead), UNITS)
    assert finding.status == expected
    assert f"{share:.0%}" in finding.observed


def test_greedy_policy_unchanged(healthy: RecordedRun) -> None:
    """A policy that never changed is a problem, unless it was right from the start."""
    changes = np.append(np.nan, np.zeros(39))[:, None]
    run = with_summary(with_diagnostics(healthy, policy_changes=changes), policy_optimal=False)
    assert find(run, POLICY).status == "problem"
    assert find(with_summary(run, policy_optimal=True), POLICY).status == "ok"
    changes[20] = 0.01
    assert find(with_diagnostics(run, policy_changes=changes), POLICY).status == "ok"
