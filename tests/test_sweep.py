"""Members with settings of their own: which they are, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dqn_fast import tree
from dqn_fast.agent import load_agent
from dqn_fast.algorithm import ChunkRecord
from dqn_fast.envs import make_env
from dqn_fast.memory import memory_needs
from dqn_fast.report.recorded import read_run, split_settings
from dqn_fast.settings import UsageError, parse
from dqn_fast.setup import Training, check, setup
from dqn_fast.sweep import SCALES, SWEPT, label_of, members_of, points_of, read_sweep, sweep_error
from dqn_fast.train import Args, train


def test_a_command_line_is_names_with_their_values():
    """Names may have hyphens; numbers may be infinite."""
    words = ["learning-rate", "1e-4", "3e-4", "max_grad_norm", "inf"]
    assert read_sweep(words) == {"learning_rate": (1e-4, 3e-4), "max_grad_norm": (math.inf,)}
    assert read_sweep([]) == {}
    with pytest.raises(ValueError, match=r"0\.9: must come after the name of a setting"):
        read_sweep(["0.9", "gamma"])


def test_a_grid_holds_all_combinations_in_order():
    """The last name varies fastest; no sweep is one setting, the run's own."""
    grid = points_of({"tau": (0.1, 0.2), "gamma": (0.9, 0.99)}, 0, seed=0)
    assert grid == [
        {"tau": 0.1, "gamma": 0.9},
        {"tau": 0.1, "gamma": 0.99},
        {"tau": 0.2, "gamma": 0.9},
        {"tau": 0.2, "gamma": 0.99},
    ]
    assert points_of({}, 0, seed=0) == [{}]


def test_random_settings_lie_in_their_range_and_repeat():
    """Scales are drawn in proportion, others uniformly; the seed decides."""
    sweep = {"learning_rate": (1e-2, 1e-4), "gamma": (0.9, 1.0)}
    points = points_of(sweep, 4_000, seed=3)
    assert points == points_of(sweep, 4_000, seed=3) != points_of(sweep, 4_000, seed=4)
    rate, gamma = (np.array([point[name] for point in points]) for name in sweep)
    assert 1e-4 <= rate.min() < rate.max() <= 1e-2
    assert (rate < 1e-3).mean() == pytest.approx(0.5, abs=0.03)
    assert 0.9 <= gamma.min() < gamma.max() <= 1.0
    assert gamma.mean() == pytest.approx(0.95, abs=0.002)


def test_every_setting_meets_every_seed():
    """Member i has setting i // num_seeds and seed `seed + i % num_seeds`."""
    members = members_of({"tau": (0.1, 0.2)}, 0, seed=5, num_seeds=3)
    assert [(m["tau"], m["seed"]) for m in members] == [
        (0.1, 5), (0.1, 6), (0.1, 7), (0.2, 5), (0.2, 6), (0.2, 7)
    ]  # fmt: skip
    assert members_of({}, 0, seed=1, num_seeds=2) == [{"seed": 1}, {"seed": 2}]


@pytest.mark.parametrize(
    ("sweep", "num_random", "message"),
    [
        ({"gamma": (0.9, 0.9)}, 0, "gamma 0.9 0.9: must have different values"),
        ({"gamma": (0.9,)}, 4, "gamma: must have two values with --sweep-random"),
        ({"max_grad_norm": (1.0, math.inf)}, 4, "max_grad_norm: must have finite values"),
        ({"tau": (0.0, 1.0)}, 4, "tau: must have values above 0 with --sweep-random"),
        ({}, 4, "must name settings with --sweep-random"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(sweep, num_random, message):
    """The message names the setting and the values that are allowed."""
    assert str(sweep_error(sweep, num_random)).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.9, 1.5], "--sweep gamma 1.5: must be in [0, 1]"),
        (0.9, "--sweep gamma 0.9: must have a tuple of numbers"),
        (["0.9"], "--sweep gamma '0.9': must be a number, in [0, 1]"),
        ([True], "--sweep gamma True: must be a number, in [0, 1]"),
        ([None], "--sweep gamma [None]: must have a tuple of numbers"),
    ],
)
def test_values_are_those_that_the_setting_allows(values, message):
    """One line, with the ranges that the setting itself declares."""
    with pytest.raises(UsageError) as caught:
        check(Args(sweep={"gamma": values}))
    assert str(caught.value) == message


def test_numbers_of_numpy_become_pythons():
    """A list or an array from a script is a tuple of floats in the files of the run."""
    args = check(Args(sweep={"tau": np.array([0.5, 1.0]), "gamma": [1, np.float32(0.5)]}))
    assert args.sweep == {"tau": (0.5, 1.0), "gamma": (1.0, 0.5)}
    assert all(type(v) is float for values in args.sweep.values() for v in values)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"batch_size": (32, 64)}, "--sweep batch_size: must be one of learning_rate, "),
        ({"gamma": ()}, "--sweep gamma: must be followed by numbers"),
        ({"gamma": ([1],)}, "--sweep gamma [1]: must be a number, in [0, 1]"),
        ({"learning_rate": (10**400, 1)}, "--sweep learning_rate 1000"),
    ],
)
@pytest.mark.parametrize("num_random", [0, 4])
def test_names_and_types_are_checked_before_values(sweep, message, num_random):
    """Whatever stands in a sweep, it costs one line."""
    with pytest.raises(UsageError) as caught:
        check(Args(sweep=sweep, sweep_random=num_random))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "words",
    [
        ["--sweep", "gamma", "0.9", "0.99", "tau", "0.5"],
        ["--sweep=gamma 0.9 0.99 tau 0.5"],
        ["--sweep={'gamma': [0.9, 0.99], 'tau': 0.5}"],
    ],
)
def test_a_sweep_is_read_as_shells_and_sweep_tools_write_it(words):
    """In words, in one word, and as Python writes a dict."""
    assert parse(Args, argv=words).sweep == {"gamma": (0.9, 0.99), "tau": (0.5,)}


def test_no_value_disappears():
    """A name or a flag that comes twice is refused, not overwritten."""
    with pytest.raises(ValueError, match="gamma: must be named once"):
        read_sweep(["gamma", "0.9", "gamma", "0.99"])
    with pytest.raises(UsageError, match="--sweep: must be given once"):
        parse(Args, argv=["--sweep", "gamma", "0.9", "--sweep", "tau", "0.5"])


def test_extreme_ranges_stay_in_their_range():
    """The draw is in logarithms, which do not overflow."""
    points = points_of({"learning_rate": (1e-300, 1e300)}, 50, seed=0)
    assert all(1e-300 <= point["learning_rate"] <= 1e300 for point in points)


def test_right_sweeps_pass():
    """Every setting alone, and none at all."""
    assert sweep_error({}, 0) is None
    for name in SWEPT:
        assert sweep_error({name: (0.25, 0.5)}, 0) is None
        assert sweep_error({name: (0.25, 0.5)}, 2) is None
    assert set(SCALES) < set(SWEPT)


def test_a_label_names_a_members_own_settings():
    """Not its seed, which the run has."""
    assert (
        label_of({"seed": 3, "learning_rate": 3e-4, "gamma": 0.99})
        == "learning_rate 0.0003, gamma 0.99"
    )
    assert label_of({"seed": 3}) == ""


SHORT = Args(
    total_timesteps=1_500,
    num_envs=16,
    hidden_sizes=(16,),
    log_interval=320,
    eval_interval=640,
    eval_episodes=3,
    engine="eager",
    quiet=True,
    report=False,
)
OTHER_VALUES = {
    "learning_rate": 3e-3,
    "learning_rate_end": 1e-3,
    "gamma": 0.9,
    "eps_start": 0.5,
    "eps_end": 0.2,
    "eps_fraction": 0.1,
    "eps_repeat": 0.5,
    "tau": 1.0,
    "max_grad_norm": 0.01,
}


def run(args: Args) -> tuple[Training, list[ChunkRecord]]:
    """A whole run, and what its chunks recorded."""
    training = setup(args)
    records = [tree.clone(record) for _, record in training.chunks()]
    training.close()
    return training, records


@pytest.mark.parametrize("name", SWEPT)
def test_a_member_is_the_single_run_of_its_settings(name):
    """Bit for bit: state and losses of all members of a sweep, with two seeds (trap 13)."""
    values = (getattr(SHORT, name), OTHER_VALUES[name])
    population, records = run(replace(SHORT, sweep={name: values}, num_seeds=2, seed=3))
    seen = []
    for i, member in enumerate(population.args.members):
        single, own = run(replace(SHORT, **{**member, "seed": member["seed"]}))
        ours = tree.member(population.state, i, 4)
        if single.state.held is None:  # members that hold no action are greedy or random alike
            ours = ours._replace(held=None)
        for a, b in zip(tree.leaves(ours), tree.leaves(single.state), strict=True):
            assert torch.equal(a.view(b.shape), b)
        for record, alone in zip(records, own, strict=True):
            assert torch.equal(record.updates[..., i], alone.updates[..., 0])
            assert torch.equal(record.episode_length[:, i], alone.episode_length[:, 0])
        seen.append(ours.params[0])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def test_every_file_names_each_members_settings(tmp_path):
    """config.json, summary.json and the agent; the best member is what `load_agent` gives."""
    sweep = {"learning_rate": (1e-6, 5e-3), "gamma": (0.9, 0.99)}
    args = replace(SHORT, sweep=sweep, run_dir=tmp_path / "run", total_timesteps=12_000)
    summary = train(args).summary
    expected = [
        {"seed": 0, "learning_rate": a, "gamma": b}
        for a in sweep["learning_rate"]
        for b in sweep["gamma"]
    ]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["derived"]["members"] == expected
    own = [{name: row[name] for name in ("seed", *sweep)} for row in summary["members"]]
    assert own == expected
    assert summary["num_members"] == 4
    # Values are exact at each member's own discount.
    start = [row["optimal_start_value"] for row in summary["members"]]
    assert start == pytest.approx([0.1, 0.72054] * 2, abs=0.2)
    assert start[0] != start[1]
    agent = load_agent(tmp_path / "run", device="cpu")
    returns = [row["eval_return_mean"] for row in summary["members"]]
    assert agent.members == expected
    assert agent.member == int(np.argmax(agent.eval_return_mean))
    assert max(returns) <= max(agent.eval_return_mean)
    assert load_agent(tmp_path / "run", member=1, device="cpu").member == 1


def test_loggers_and_report_name_each_members_settings(tmp_path):
    """A TensorBoard folder and a wandb run for each member; in the report each setting is a curve
    and a row of its own, and members keep their number."""
    sweep = {"learning_rate": (1e-4, 5e-3)}
    args = replace(SHORT, sweep=sweep, run_dir=tmp_path / "run", name="rates", num_seeds=2)
    args = replace(args, report=True, tensorboard=True, track=True, wandb_mode="offline")
    summary = train(args).summary
    folders = {path.name for path in (tmp_path / "run" / "tensorboard").iterdir() if path.is_dir()}
    assert folders == {
        "member_0 learning_rate 0.0001",
        "member_1 learning_rate 0.0001",
        "member_2 learning_rate 0.005",
        "member_3 learning_rate 0.005",
    }
    parts = split_settings(read_run(tmp_path / "run"))
    assert [part.name for part in parts] == [
        "rates · learning_rate 0.0001",
        "rates · learning_rate 0.005",
    ]
    assert [part.first_member for part in parts] == [0, 2]
    whole = read_run(tmp_path / "run")
    for i, part in enumerate(parts):
        mine = slice(2 * i, 2 * i + 2)
        assert part.num_members == 2
        assert part.part("args")["learning_rate"] == sweep["learning_rate"][i]
        for name in ("losses/td_loss", "eval/return_mean"):
            ours, all_members = part.metrics[name], whole.metrics[name][:, mine]
            assert np.array_equal(ours, all_members, equal_nan=True)
        rows = summary["members"][mine]
        assert part.summary["members"] == rows
        mean = np.mean([row["eval_return_mean"] for row in rows])
        assert part.number("eval_return_mean") == pytest.approx(mean)
        episodes = [row["num_episodes"] for row in rows]
        assert np.bincount(part.episodes["member"], minlength=2).tolist() == episodes
        assert part.diagnostics["q_values"].shape[1] == 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert "rates · learning_rate 0.005" in page
    assert "learning_rate 0.0001, member 1" in page


def test_a_report_compares_with_the_exact_values_of_each_gamma(tmp_path):
    """Members that differ in gamma have different optima."""
    args = replace(SHORT, sweep={"gamma": (0.9, 0.99)}, run_dir=tmp_path / "run", report=True)
    train(args)
    parts = split_settings(read_run(tmp_path / "run"))
    q_stars = [part.diagnostics["q_star"] for part in parts]
    assert [q.shape for q in q_stars] == [(15, 2)] * 2
    assert q_stars[0][0, 1] < 0.5 < q_stars[1][0, 1]
    assert all(not part.gaps for part in parts)
    assert [part.optimal_return for part in parts] == pytest.approx([0.845, 0.845], abs=0.02)


def test_a_run_without_a_sweep_is_one(tmp_path):
    """Several seeds of the same settings stay together."""
    train(replace(SHORT, num_seeds=2, run_dir=tmp_path / "run"))
    run = read_run(tmp_path / "run")
    assert split_settings(run) == [run]
    assert run.num_members == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"sweep": {"gamma": (0.9,)}},
        {"sweep": {"gamma": (0.9, 0.95)}, "sweep_random": 1},
        {"sweep": {"max_grad_norm": (1.0, math.inf)}},
    ],
)
def test_small_sweeps_end_well(changes, tmp_path, capsys):
    """One setting alone, and infinite values: closing lines and report are complete."""
    args = replace(SHORT, quiet=False, report=True, run_dir=tmp_path / "run", **changes)
    train(args)
    out, err = capsys.readouterr()
    assert "done: 1,504 transitions" in out
    assert "warning" not in err
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"{next(iter(changes['sweep']))} " in page


def test_settings_that_look_equal_stay_apart(tmp_path):
    """Settings are told apart by their values, not by how these are printed."""
    sweep = {"gamma": (0.99000001, 0.99000002), "learning_rate": (1e-3, 1e-4)}
    train(replace(SHORT, sweep=sweep, run_dir=tmp_path / "run"))
    (tmp_path / "run" / "summary.json").unlink()  # as if it had been cut off
    parts = split_settings(read_run(tmp_path / "run"))
    assert [part.first_member for part in parts] == [0, 1, 2, 3]
    assert [part.num_members for part in parts] == [1] * 4
    assert [part.part("args")["learning_rate"] for part in parts] == [1e-3, 1e-4] * 2


def test_epsilon_is_logged_for_each_member_wherever_it_differs(tmp_path):
    """To the end of the run, where members may agree."""
    train(replace(SHORT, sweep={"eps_fraction": (0.1, 0.5)}, run_dir=tmp_path / "run"))
    epsilon = read_run(tmp_path / "run").metrics["charts/epsilon"]
    assert epsilon.shape[1] == 2
    assert np.isfinite(epsilon).all()
    assert (epsilon[:-1, 0] <= epsilon[:-1, 1]).all()


def test_the_film_and_the_closing_line_are_of_the_best_evaluation(tmp_path, capsys):
    """Not of the last one."""
    args = replace(SHORT, sweep={"tau": (0.02, 1.0)}, num_seeds=2, quiet=False)
    summary = train(replace(args, run_dir=tmp_path / "run")).summary
    best = [row["eval_return_best"] for row in summary["members"]]
    agent = load_agent(tmp_path / "run", device="cpu")
    assert best == agent.eval_return_mean
    assert f"best member {agent.member} (" in capsys.readouterr().out


def test_memory_counts_what_any_member_needs():
    """Random actions that last for one member are kept for all."""
    env = make_env("LineWorld-v0")
    device = torch.device("cpu")
    swept = memory_needs(Args(sweep={"eps_repeat": (0.0, 0.5)}), env, device)
    plain = memory_needs(Args(num_seeds=2, eps_repeat=0.5), env, device)
    assert swept.kept["environments"] == plain.kept["environments"]


def test_a_sweep_that_is_too_large_is_named():
    """Before anything is made for each member."""
    with pytest.raises(UsageError, match=r"--sweep with 1000000000 settings: must be at most "):
        setup(Args(sweep={"gamma": (0.9, 0.99)}, sweep_random=10**9, buffer_size=64))
