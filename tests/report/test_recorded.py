"""Reading the directories of finished, interrupted and damaged runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dqn_fast.report.recorded import read_run
from tests.report.recorded_runs import change_json, write_run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", members=3, log_points=12)


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_whole_run_comes_back(path: Path) -> None:
    """Metrics have a column per member, or one where members share the value."""
    run = read_run(path)
    assert run.gaps == ()
    assert run.num_members == 3
    assert run.global_step.tolist() == [1_000 * (i + 1) for i in range(12)]
    loss = [row["members"]["losses/td_loss"] for row in rows(path)]  # type: ignore[index]
    np.testing.assert_array_equal(run.metrics["losses/td_loss"], loss)
    assert run.metrics["charts/epsilon"].shape == (12, 1)
    assert np.isfinite(run.metrics["eval/return_mean"]).all(1).tolist() == [False] * 3 + [
        True,
        *[False] * 3,
        True,
        *[False] * 3,
        True,
    ]
    np.testing.assert_array_equal(run.final_returns, run.metrics["eval/return_mean"][-1])
    assert len(run.episodes["member"]) == 300
    assert run.diagnostics["q_values"].shape == (12, 3, 15, 2)


def test_a_torn_line_is_left_out_and_named(path: Path) -> None:
    """The lines before a torn one are all there."""
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 13000, "losses/td_lo')
    run = read_run(path)
    assert len(run.global_step) == 12
    assert run.gaps == ("metrics.jsonl holds a line that is not whole, left out here.",)


@pytest.mark.parametrize(
    "name", ["config.json", "summary.json", "metrics.jsonl", "episodes.npz", "diagnostics.npz"]
)
def test_a_missing_or_broken_file_is_named(path: Path, name: str) -> None:
    """Any file may be missing, empty, cut short or nonsense; the page can say which."""
    content = (path / name).read_bytes()
    for broken in (None, b"", content[: len(content) // 2], b"\x00\xff nonsense", b"[1, 2"):
        if broken is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(broken)
        gaps = read_run(path).gaps
        if not (name == "metrics.jsonl" and broken == b""):  # an empty log is a whole one
            assert len(gaps) == 1
            assert name in gaps[0]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    """Missing and unrelated directories have their name in the message."""
    with pytest.raises(ValueError, match="nowhere"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a run directory"):
        read_run(tmp_path)


def test_arrays_that_do_not_fit_are_left_out(path: Path) -> None:
    """An array of another length than its neighbours is named, and the others stay."""
    with np.load(path / "diagnostics.npz") as file:
        arrays = dict(file)
    arrays["visits"] = arrays["visits"][:5]
    np.savez(path / "diagnostics.npz", **arrays)
    run = read_run(path)
    assert run.gaps == ("diagnostics.npz: visits has shape (5, 3, 15), left out here.",)
    assert "visits" not in run.diagnostics
    assert "q_values" in run.diagnostics


def test_a_loss_that_was_not_finite(path: Path) -> None:
    """null where a loss was measured is a loss that was not finite; its first step is kept."""
    changed = rows(path)
    for row in changed[6:]:
        row["losses/td_loss"] = None
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    assert read_run(path).loss_not_finite_at == 7_000


def test_wall_time_goes_on_after_a_resumption(path: Path) -> None:
    """A resumed run starts its clock at zero again; the time spent before is added."""
    changed = rows(path)
    for i, wall in enumerate([1.0, 2.0, 0.5, 1.5, None, 2.5]):
        changed[i]["wall_s"] = wall
    lines = "".join(json.dumps(row) + "\n" for row in changed[:6])
    (path / "metrics.jsonl").write_text(lines)
    assert read_run(path).wall_s.tolist() == [1.0, 2.0, 2.5, 3.5, 3.5, 4.5]


def test_numbers_from_summary_and_settings(path: Path) -> None:
    """The summary goes before the settings; text, null and yes/no are no numbers."""
    run = read_run(path)
    assert run.number("global_step") == 12_000
    assert run.number("buffer_size") == 25_000
    assert run.number("max_steps") == 40
    assert [run.number(n) for n in ("status", "policy_optimal", "learning_rate_end")] == [None] * 3


def test_the_optimum_from_either_file(path: Path) -> None:
    """Known from the summary, or from the diagnostics where the run did not get to write one."""
    change_json(path / "summary.json", optimal_return=0.5)
    assert read_run(path).optimal_return == 0.5
    (path / "summary.json").unlink()
    assert read_run(path).optimal_return == pytest.approx(0.84506, abs=1e-5)


def test_an_agent_without_episode(path: Path) -> None:
    """A run in which no episode has finished yet has no episodes, and that is no gap."""
    np.savez(path / "episodes.npz", num_dropped=np.array(0))
    run = read_run(path)
    assert run.episodes == {}
    assert run.gaps == ()
