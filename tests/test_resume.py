"""A run that stops and goes on is the run that never stopped, bit for bit."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dqn_fast import tree
from dqn_fast.envs import LineWorld
from dqn_fast.record.checkpoint import load_checkpoint, save_checkpoint
from dqn_fast.resume import open_run
from dqn_fast.settings import UsageError
from dqn_fast.train import Args, train

TIMES = ("wall_s", "startup_s", "compile_s", "eval_s", "loop_s", "env_steps_per_s", "updates_per_s")


def settings(run_dir: Path, **more: Any) -> Args:
    """A short run with log points, evaluations and checkpoints at odd places."""
    short: dict[str, Any] = {
        "run_dir": run_dir,
        "total_timesteps": 2_000,
        "num_envs": 8,
        "learning_starts": 300,
        "buffer_size": 700,  # its end is crossed
        "hidden_sizes": (16,),
        "batch_size": 16,
        "log_interval": 130,
        "eval_interval": 500,
        "eval_episodes": 3,
        "checkpoint_interval": 600,
        "engine": "eager",
        "report": False,
        "quiet": True,
    }
    return Args(**{**short, **more})


def after(chunks: int) -> Callable[[], bool]:
    """`should_stop` that is true from its n-th call on."""
    asked = iter(range(1_000_000))
    return lambda: next(asked) >= chunks


def content(run_dir: Path) -> dict[str, Any]:
    """Everything that a run leaves, without times."""
    rows = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        keys = ("wall_s", "perf/env_steps_per_s", "perf/updates_per_s")
        members = {k: v for k, v in row.get("members", {}).items() if k not in keys}
        rows.append({**{k: v for k, v in row.items() if k not in keys}, "members": members})
    summary = json.loads((run_dir / "summary.json").read_text())
    arrays = {}
    for name in ("episodes.npz", "diagnostics.npz"):
        with np.load(run_dir / name) as file:
            arrays |= {f"{name}/{key}": file[key].tobytes() for key in file}
    checkpoint = load_checkpoint(run_dir / "checkpoint.pt")
    resume = checkpoint["resume"]
    record = {k: v for k, v in resume["record"].items() if k not in ("spent", "eval_s", "tracker")}
    record["window"] = record["window"][:2]
    kept = {**resume, "record": record}
    tensors = [t.numpy().tobytes() for t in tree.leaves((checkpoint["q_net"], kept))]
    best = load_checkpoint(run_dir / "best.pt")
    return {
        "rows": rows,
        "summary": {k: v for k, v in summary.items() if k not in TIMES},
        "arrays": arrays,
        "tensors": tensors,
        "plain": repr(list(plain(kept))),
        "best": [t.numpy().tobytes() for t in tree.leaves(best)],
    }


def plain(value: Any) -> Any:
    """The values of a tree that are no tensors."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from plain(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from plain(item)
    elif not isinstance(value, torch.Tensor):
        yield value


KINDS: dict[str, dict[str, Any]] = {
    "line_world": {},
    "cartpole": {"env_id": "CartPole-v1", "num_envs": 7, "max_grad_norm": 0.5},
    "table": {"env_id": "FrozenLake-v1", "eps_repeat": 0.6, "double_q": True},
    "members": {"num_seeds": 4, "chunk_steps": 3},
    "sweep": {"sweep": {"gamma": (0.9, 0.99), "eps_end": (0.1, 0.5)}},
    "gymnasium": {"env_id": "gym:CartPole-v1", "total_timesteps": 1_200},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_undisturbed_one(kind, tmp_path):
    """Parameters, moments, replay, metrics, episodes, diagnostics and summary; stopped before
    learning starts, in a log window, and after the ring's end, three times in one run."""
    more = KINDS[kind]
    train(settings(tmp_path / "whole", **more))
    expected = content(tmp_path / "whole")
    generator = random.Random(kind)
    stops = [generator.randrange(1, 4), *(generator.randrange(3, 25) for _ in range(3))]
    run_dir = tmp_path / "parts"
    result = train(settings(run_dir, **more), should_stop=after(stops[0]))
    assert result.summary["status"] == "stopped"
    for stop in [*stops[1:], 10**9]:
        if result.summary["status"] == "stopped":
            result = train(Args(resume=run_dir), should_stop=after(stop))
    found = content(run_dir)
    for name, value in expected.items():
        assert found[name] == value, name


def stopped_run(run_dir: Path, chunks: int = 12, **more: Any) -> Path:
    """The directory of a run that was stopped after some chunks."""
    result = train(settings(run_dir, **more), should_stop=after(chunks))
    assert result.summary["status"] == "stopped"
    return run_dir


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 0.5}, "--gamma 0.5: must be 0.99, as in "),
        ({"num_envs": 16}, "--num-envs 16: must be 8, as in "),
        ({"hidden_sizes": (8, 8)}, "--hidden-sizes "),
        ({"env_id": "CartPole-v1"}, "--env-id CartPole-v1: must be LineWorld-v0, as in "),
        ({"run_dir": Path("elsewhere")}, "--run-dir elsewhere: must be "),
        ({"total_timesteps": 100}, "--total-timesteps 100: must be at least "),
    ],
)
def test_settings_that_change_what_is_learned_are_refused(changes, message, tmp_path):
    """By name, and nothing is changed."""
    run_dir = stopped_run(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with pytest.raises(UsageError, match=message):
        train(Args(resume=run_dir, **changes))
    assert before == {path.name: path.read_bytes() for path in run_dir.iterdir()}


def test_a_longer_run_goes_on_and_says_what_differs(tmp_path, capsys):
    """Length, intervals and logging may change; the header and config.json name the effect."""
    run_dir = tmp_path / "run"
    train(settings(run_dir))
    capsys.readouterr()
    result = train(Args(resume=run_dir, total_timesteps=3_000, log_interval=500, quiet=True))
    assert result.summary["global_step"] == 3_000
    config = json.loads((run_dir / "config.json").read_text())
    assert config["args"]["total_timesteps"] == 3_000
    (resumed,) = config["resumed"]
    assert resumed["global_step"] == 2_000
    assert [note.split(":")[0] for note in resumed["differs"]] == [
        "total_timesteps 2000 -> 3000",
        "log_interval 130 -> 500",
    ]
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["global_step"] for line in lines]
    assert steps == sorted(set(steps))
    assert steps[-1] == 3_000


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    """Resumed again, as a job queue does, it ends at once with the same files."""
    run_dir = tmp_path / "run"
    train(settings(run_dir))
    before = content(run_dir)
    assert train(Args(resume=run_dir)).summary["status"] == "done"
    assert content(run_dir) == before


def test_a_solved_run_stays_solved(tmp_path):
    """Unless its goal changes; then it goes on."""
    run_dir = tmp_path / "run"
    train(settings(run_dir, stop_at_return=-10.0))
    result = train(Args(resume=run_dir))
    assert (result.summary["status"], result.summary["global_step"]) == ("solved", 504)
    result = train(Args(resume=run_dir, stop_at_return=100.0))
    assert (result.summary["status"], result.summary["global_step"]) == ("done", 2_000)


def test_an_evaluation_that_is_interrupted_is_made_again(tmp_path):
    """The stop is answered within the evaluation, and the run is the undisturbed one."""
    train(settings(tmp_path / "whole"))
    asked_in: list[str] = []

    def should_stop() -> bool:
        frame = sys._getframe(2)
        asked_in.append(frame.f_code.co_name)
        return asked_in.count("_play_round") == 2

    run_dir = tmp_path / "parts"
    result = train(settings(run_dir), should_stop=should_stop)
    assert result.summary["status"] == "stopped"
    assert result.summary["global_step"] == 1_000
    train(Args(resume=run_dir))
    assert content(run_dir) == content(tmp_path / "whole")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    """A changed byte in a tensor is found by the digest; the run says so and equals the
    undisturbed one in the end."""
    train(settings(tmp_path / "whole"))
    run_dir = stopped_run(tmp_path / "run", 15)
    path = run_dir / "checkpoint.pt"
    before = load_checkpoint(run_dir / "checkpoint.1.pt")["resume"]["global_step"]
    data = bytearray(path.read_bytes())
    place = data.find(load_checkpoint(path)["q_net"]["weight_0"].numpy().tobytes())
    data[place + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"checkpoint.pt: is damaged, its digest differs"):
        load_checkpoint(path)
    capsys.readouterr()
    train(Args(resume=run_dir, report=False), should_stop=after(0))
    train(Args(resume=run_dir))
    config = json.loads((run_dir / "config.json").read_text())
    assert config["resumed"][0]["global_step"] == before
    assert "is damaged" in config["resumed"][0]["differs"][0]
    assert content(run_dir)["arrays"] == content(tmp_path / "whole")["arrays"]
    assert content(run_dir)["rows"] == content(tmp_path / "whole")["rows"]


def test_without_replay_it_fills_again_first(tmp_path):
    """No gradient step until as many transitions are there as before the first one; and the file
    has no replay."""
    run_dir = stopped_run(tmp_path / "run", 14, checkpoint_replay=False)
    saved = load_checkpoint(run_dir / "checkpoint.pt")["resume"]
    assert saved["state"]["replay"] is None
    updates: list[tuple[int, int]] = []

    def note(step: int, training: Any, row: dict[str, Any]) -> None:
        updates.append((step, int(row.get("losses/td_loss") is not None)))

    result = train(Args(resume=run_dir, log_interval=8), on_log=note)
    first = next(step for step, learns in updates if learns and step > saved["global_step"])
    assert first - saved["global_step"] == pytest.approx(304, abs=16)
    config = json.loads((run_dir / "config.json").read_text())
    assert "it fills again" in " ".join(config["resumed"][0]["differs"])
    assert result.summary["num_updates"] > saved["num_updates"]


def test_a_run_that_broke_off_goes_on_from_its_last_good_checkpoint(tmp_path):
    """An exception in a hook costs nothing: checkpoint.pt stands, broken.pt holds what broke."""
    train(settings(tmp_path / "whole"))

    def fail(step: int, training: Any, row: dict[str, Any]) -> None:
        if step > 1_300:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(settings(tmp_path / "run"), on_log=fail)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["resume"]["global_step"] == 1_200
    assert (tmp_path / "run" / "broken.pt").exists()
    train(Args(resume=tmp_path / "run"))
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_another_process_that_writes_the_directory_is_respected(tmp_path):
    """Also another run of this process; afterwards it is free again."""
    run_dir = stopped_run(tmp_path / "run")
    first = open_run(run_dir)
    with pytest.raises(UsageError, match="another run is writing it"):
        open_run(run_dir)
    command = [sys.executable, "-m", "dqn_fast.train", "--resume", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "another run is writing it" in done.stderr
    first.lock.release()
    open_run(run_dir).lock.release()


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    """Temporary files of a write that never ended; nothing else."""
    run_dir = stopped_run(tmp_path / "run")
    (run_dir / ".checkpoint.pt.12345").write_bytes(b"half")
    (run_dir / ".notes").write_text("mine")
    open_run(run_dir).lock.release()
    assert not (run_dir / ".checkpoint.pt.12345").exists()
    assert (run_dir / ".notes").exists()


@dataclass(frozen=True)
class Own(LineWorld):
    """A class that only its owner knows."""


def test_an_environment_of_ones_own_has_to_be_given_again(tmp_path):
    """The run cannot make it; with it, it goes on, and so it does with its import path."""
    train(settings(tmp_path / "whole"), env=Own(9, 20))
    for number, given in enumerate(({"env": Own(9, 20)}, {})):
        run_dir = tmp_path / f"run{number}"
        train(settings(run_dir), env=Own(9, 20), should_stop=after(9))
        with pytest.raises(UsageError, match=r"its environment was made in Python; .*env=\.\.\."):
            train(Args(resume=run_dir))
        with pytest.raises(UsageError, match=r"checkpoint.pt: params/0: must be"):
            train(Args(resume=run_dir), env=Own(10, 20))
        named: dict[str, Any] = {"env": "tests.test_resume:Own"}
        named["env_params"] = {"n_states": 9, "max_steps": 20}
        train(Args(resume=run_dir, **({} if given else named)), **given)
        assert content(run_dir) == content(tmp_path / "whole")


def test_an_instance_of_a_known_class_is_made_again(tmp_path):
    """Its id and its parameters are in the run."""
    train(settings(tmp_path / "whole"), env=LineWorld(9, 20))
    train(settings(tmp_path / "run"), env=LineWorld(9, 20), should_stop=after(9))
    train(Args(resume=tmp_path / "run"))
    assert content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.mark.parametrize("engine", ["fused", pytest.param("compile", marks=pytest.mark.slow)])
def test_a_compiled_run_is_resumed_bit_for_bit(engine, tmp_path):
    """Also across the first gradient step, at which compiled functions take over, wherever a chunk
    ends."""
    more: dict[str, Any] = {"engine": engine, "num_seeds": 2, "train_freq": 8}
    train(settings(tmp_path / "whole", **more))
    expected = content(tmp_path / "whole")
    assert expected["summary"]["engine"] == engine
    generator = random.Random(engine)
    for i in range(4):
        run_dir = tmp_path / str(i)
        result = train(
            settings(run_dir, **more, chunk_steps=5 + i), should_stop=after(generator.randrange(40))
        )
        while result.summary["status"] == "stopped":
            result = train(Args(resume=run_dir), should_stop=after(generator.randrange(3, 40)))
        found = content(run_dir)
        for name, value in expected.items():
            if name not in ("plain",):
                assert found[name] == value, name


@pytest.mark.parametrize(
    "place",
    [
        ("config",), ("config", "args"), ("config", "args", "env_id"), ("config", "software"),
        ("resume",), ("resume", "global_step"), ("resume", "replay_rows"), ("resume", "state"),
        ("resume", "state", "params"), ("resume", "best"), ("resume", "best", "weights"),
        ("resume", "record"), ("resume", "record", "metrics"), ("resume", "record", "spent"),
        ("resume", "record", "diagnostics"), ("resume", "record", "window"),
    ],
    ids="/".join,
)  # fmt: skip
@pytest.mark.parametrize("value", [None, "text", -3, []], ids=repr)
def test_an_odd_checkpoint_is_one_line(place, value, tmp_path):
    """Its digest is right, and what it holds is not: nothing is changed, no other error comes."""
    (run_dir := tmp_path / "run").mkdir()
    content = load_checkpoint(saved_run() / "checkpoint.pt")
    inner = content
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    save_checkpoint(run_dir / "checkpoint.pt", content)
    with pytest.raises(UsageError) as caught:
        train(Args(resume=run_dir))
    assert "\n" not in str(caught.value)
    assert {path.name for path in run_dir.iterdir()} <= {"checkpoint.pt", ".lock"}


@cache
def saved_run() -> Path:
    """A run that was stopped, for tests that only read it."""
    return stopped_run(Path(tempfile.mkdtemp()) / "run")
