"""The record of a run, through its real loggers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from dqn_fast.record.describe import summarise
from dqn_fast.train import Args, train
from tests.record.test_tracker import on_terminal, wandb_files

ARGS = Args(total_timesteps=4_000, eval_interval=2_000, quiet=True, report=False)


@pytest.fixture(autouse=True)
def no_inherited_wandb(monkeypatch, tmp_path):
    """wandb leaves the address of its service behind; and its files stay out of the home folder."""
    for name in ("WANDB_SERVICE", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_track_logs_settings_and_every_metric(tmp_path):
    """A real offline run: config, the x axis, each metric of metrics.jsonl, summary, best agent."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "dqn_fast.train", "--track", "--wandb-mode", "offline"]
    flags = ["--total-timesteps", "4000", "--eval-interval", "2000", "--run-dir", str(run_dir)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=True)
    assert "wandb sync" in done.stdout
    (file,) = wandb_files(run_dir).values()
    assert file.config["args"]["num_envs"] == 64
    assert file.config["derived"]["replay_ratio"] == 4.0
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in file.history if "charts/epsilon" in row]
    assert [row["global_step"] for row in logged] == [row["global_step"] for row in rows]
    for ours, theirs in zip(logged, rows, strict=True):
        for name, value in theirs.items():
            if value is not None and name != "wall_s":
                assert ours[name] == pytest.approx(value)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert file.summary["eval_return_mean"] == summary["eval_return_mean"]
    assert any(artifact.type == "model" for artifact in file.artifacts)
    charts = {
        path.name for path in run_dir.glob("wandb/offline-run-*/files/media/plotly/**/*.json")
    }
    for name in ("epsilon", "q-error-table"):
        assert any(name in chart for chart in charts), charts
    assert file.exit_code == 0


def test_members_become_a_mean_and_a_row_each(tmp_path):
    """Top level: means, and `policy_optimal` only if all are; `members`: a row for each seed."""
    summary = train(replace(ARGS, num_seeds=3, seed=4, run_dir=tmp_path / "run")).summary
    members = summary["members"]
    assert [member["seed"] for member in members] == [4, 5, 6]
    for name in ("eval_return_mean", "eval_return_std", "q_error_max", "num_episodes"):
        assert summary[name] == pytest.approx(sum(m[name] for m in members) / 3)
    steps = summary["global_step"] * 3
    assert summary["env_steps_per_s"] == pytest.approx(steps / summary["loop_s"])
    spent = ("startup_s", "loop_s", "eval_s", "compile_s")
    assert sum(summary[name] for name in spent) <= summary["wall_s"]


def test_summaries_say_what_is_not_known():
    """None for a member makes the mean None; one member needs no rows."""
    assert summarise({"seed": 1}, {"x": [None]}, [{"seed": 1}]) == {"seed": 1, "x": None}
    members = [{"seed": 1}, {"seed": 2}]
    both = summarise({"seed": 1}, {"x": [1.0, 2.0], "ok": [True, False]}, members)
    assert both["x"] == 1.5
    assert both["ok"] is False
    assert both["members"] == [
        {"seed": 1, "x": 1.0, "ok": True},
        {"seed": 2, "x": 2.0, "ok": False},
    ]


def test_a_terminal_shows_a_progress_bar(tmp_path):
    """Steps/s, return, epsilon and time left, on a real terminal; the closing lines come last."""
    command = [sys.executable, "-m", "dqn_fast.train", "--run-dir", str(tmp_path / "run")]
    shown = on_terminal([*command, "--total-timesteps", "40000"])
    assert "40000/40000 [" in shown
    for text in ("steps/s", "return", "epsilon 0.050", "<00:0"):
        assert text in shown
    assert shown.index("100%|") < shown.index("done: 40,000 transitions")
    assert shown.rstrip().endswith(f"results in {tmp_path / 'run'}")


def test_tensorboard_gets_the_metrics(tmp_path):
    """Event files beside the others."""
    run_dir = tmp_path / "run"
    train(replace(ARGS, tensorboard=True, run_dir=run_dir))
    assert list(run_dir.glob("tensorboard/**/events.out.tfevents.*"))


def test_a_report_that_fails_costs_a_warning(tmp_path, monkeypatch, capsys):
    """Whatever goes wrong with the page, the run's own files are there and the run succeeds."""
    from dqn_fast.record import run

    def fail(*_):
        raise ZeroDivisionError("no such luck")

    monkeypatch.setattr(run, "write_report", fail)
    result = train(replace(ARGS, report=True, run_dir=tmp_path / "run"))
    assert result.summary["status"] == "done"
    err = capsys.readouterr().err
    assert err == "warning: no report.html: ZeroDivisionError: no such luck\n"


def test_every_run_leaves_a_report(tmp_path):
    """One HTML file that shows this run, also of several members."""
    train(replace(ARGS, report=True, num_seeds=2, name="mine", run_dir=tmp_path / "run"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "LineWorld-v0" in page
    assert "mine" in page
