"""Memory computed from the settings: against hand calculations, against what runs really take, and
refused in words where it is not there."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqn_fast import dqn, evaluate, exact, memory, setup, train, tree
from dqn_fast.envs import TensorEnv, make_env
from dqn_fast.memory import Layout, check_memory, free_memory, free_on_host, memory_needs
from dqn_fast.record import run
from dqn_fast.record.diagnostics import MOST_SNAPSHOTS, SAMPLE_SIZE
from dqn_fast.record.metrics import EpisodeLog
from dqn_fast.setup import check, make_plan
from dqn_fast.train import Args

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SMALL = Args(
    num_seeds=2,
    num_envs=4,
    buffer_size=100,
    batch_size=8,
    hidden_sizes=(32, 16),
    eval_episodes=10,
    total_timesteps=1_000,
    log_interval=200,
    train_freq=2,
)


def set_free(monkeypatch, size: int | None) -> None:
    """Let so many bytes be free on every device."""
    monkeypatch.setattr(memory, "free_memory", lambda device: size)


def refusal(args: Args, env: TensorEnv | None = None, device: torch.device = CPU) -> str:
    """The one line that says why a run does not fit."""
    with pytest.raises(ValueError) as error:
        check_memory(args, env or make_env(args.env_id), device)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# -------------------------------------------------------------------------------- what is counted


def test_replay_by_hand():
    """LineWorld stores 8 bytes a transition (two positions, action, reward, flag), CartPole 38."""
    args = replace(SMALL, num_seeds=3, buffer_size=1_000)
    assert memory_needs(args, make_env("LineWorld-v0"), CPU).kept["replay"] == 3 * 1_000 * 8
    assert memory_needs(args, make_env("CartPole-v1"), CPU).kept["replay"] == 3 * 1_000 * 38


def test_kept_parts_by_hand():
    """Networks, copies, noise and metrics of a small run of CartPole."""
    kept = memory_needs(SMALL, make_env("CartPole-v1"), CPU).kept
    parameters = (4 + 1) * 32 + (32 + 1) * 16 + (16 + 1) * 2
    assert kept["members"] == 2 * parameters * 4 * 6  # online, target, two moments, two copies
    copy = 4 * 4 + 4 * 4 + 4 + 4  # physics, observation, elapsed, return
    assert kept["environments"] == 2 * 4 * copy
    # A vector step draws 2 numbers to explore and 4 for a reset for each copy, and 2 x 8 rows.
    numbers = 2 * (4 * (2 + 4) + 2 * 2 * 8)
    assert make_plan(SMALL, make_env("CartPole-v1")).max_window_steps > 250
    assert kept["noise"] == numbers * 4 * (250 + 250)
    assert kept["metrics"] == 8 * 250 * 2 * 4 + 4 * 4 * 2 * 1_024
    carried = 2 * 100 * 38 + kept["environments"] + 2 * parameters * 4 * 4
    assert kept["files"] == 2 * carried + 2 * parameters * 4  # two checkpoints, the best agent
    assert kept["diagnostics"] == 2 * (5 + 2) * 2 * (4 * SAMPLE_SIZE + 8)


def test_diagnostics_of_a_table_by_hand():
    """A snapshot of LineWorld holds values and visits of 15 states; there are at most so many."""
    kept = memory_needs(replace(SMALL, log_interval=1), make_env("LineWorld-v0"), CPU).kept
    snapshot = 4 * SAMPLE_SIZE + 8 + 15 * (2 * 4 + 8)
    assert kept["diagnostics"] == 2 * (MOST_SNAPSHOTS + 2) * 2 * snapshot


def test_a_gradient_step_by_hand():
    """Every layer's output of both passes, and what Adam makes, in the shape of the parameters."""
    args = replace(SMALL, batch_size=100, hidden_sizes=(10,))
    smaller = replace(args, batch_size=99)
    steps = [
        memory_needs(a, make_env("CartPole-v1"), CPU).passing["gradient step"]
        for a in (args, smaller)
    ]
    row = 38 + 32 + 2 * 4 * 4 + 4  # stored, its place, the features of both observations
    row += 4 * (10 + 2) + 4 * (2 * 10 + 5 * 2) + 32  # outputs; backward; targets and losses
    assert steps[0] - steps[1] == 2 * row
    assert steps[0] - 100 * 2 * row == 2 * (5 * 10 + 11 * 2) * 4 * 3


def test_copies_of_an_evaluation_count_and_not_its_episodes():
    """On the host as many as training has, or as asked for; an episode takes only its results."""
    env = make_env("gym:CartPole-v1")

    def evaluation(**settings: int | None) -> int:
        return memory_needs(replace(SMALL, **settings), env, CPU).passing["evaluation"]

    few, many = evaluation(eval_episodes=4), evaluation(eval_episodes=1_004)
    assert many - few == 2 * 1_000 * 32
    eight = evaluation(eval_episodes=1_004, eval_envs=8)
    assert eight - many == few - 2 * 4 * 32
    assert evaluation(eval_episodes=0) == 0
    assert evaluation(eval_episodes=None) == evaluation(eval_episodes=100)


def test_held_actions_and_wide_actions_count():
    """A random action that lasts is 8 bytes a copy; above 256 actions each takes 2 bytes."""
    env = make_env("LineWorld-v0")
    plain, held = (
        memory_needs(replace(SMALL, eps_repeat=repeat), env, CPU).kept["environments"]
        for repeat in (0.0, 0.5)
    )
    assert held - plain == 2 * 4 * 8

    class Many(type(env)):  # type: ignore[misc]
        num_actions = 300

    assert memory_needs(SMALL, Many(), CPU).kept["replay"] == 2 * 100 * 9


def test_the_worst_moment_counts_once():
    """The total is all that is kept and the largest of what passes; the parts are sorted."""
    needs = memory_needs(SMALL, make_env("LineWorld-v0"), CPU)
    assert needs.total == sum(needs.kept.values()) + max(needs.passing.values())
    assert list(needs.parts.values()) == sorted(needs.parts.values(), reverse=True)
    assert set(needs.parts) == set(needs.kept) | set(needs.passing) <= set(memory.FLAGS)


def test_on_cuda_graphs_keep_their_memory_and_files_are_made_on_the_host():
    """Vector step and gradient step are there all the time; no copy of the state is."""
    on_cpu, on_cuda = (memory_needs(SMALL, make_env("CartPole-v1"), d) for d in (CPU, CUDA))
    assert on_cuda.kept["gradient step"] == on_cpu.passing["gradient step"]
    assert "vector step" in on_cuda.kept
    assert not {"files", "diagnostics", "gaps"} & on_cuda.kept.keys()


def test_a_large_checkpoint_is_not_copied():
    """At most two of 256 MiB are."""
    small, large = (
        memory_needs(replace(SMALL, buffer_size=size), make_env("LineWorld-v0"), CPU).kept["files"]
        for size in (2**25, 10**9)
    )
    assert 2**29 < small == large < 2**29 + 10**5


def test_what_an_engine_copies_counts():
    """Two copies of all that is carried."""
    env = make_env("LineWorld-v0")
    kept = memory_needs(SMALL, env, CPU).kept
    carried = kept["replay"] + kept["environments"] + kept["members"] * 4 // 6
    assert memory_needs(SMALL, env, CPU, state_copies=2).passing["compiling"] == 2 * carried


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_copies_on_the_host_count_and_are_not_made(mode):
    """At least 4 KiB each, 4 MiB in a process of its own; none is made to find out."""
    env = make_env("gym:CartPole-v1", {}, mode)
    needs = memory_needs(replace(SMALL, num_envs=10**12, buffer_size=10**12), env, CPU)
    assert needs.kept["environments"] > 2 * 10**12 * (2**12 if mode == "sync" else 2**22)


def test_layouts_are_those_of_states():
    """Bytes of a transition, of a copy and of a member, against the tensors of a real state."""
    for env_id in ("LineWorld-v0", "CartPole-v1", "Acrobot-v1", "MountainCar-v0", "FrozenLake-v1"):
        args = replace(SMALL, env_id=env_id, eps_repeat=0.0)
        env = make_env(env_id)
        state = setup.setup(args, env).state
        kept = memory_needs(args, env, CPU).kept
        assert kept["replay"] == tree.num_bytes(state.replay.rows)
        assert kept["environments"] == tree.num_bytes(state.env)
        assert kept["members"] == 6 * tree.num_bytes(state.params)
        carried = kept["replay"] + kept["environments"] + kept["members"] * 4 // 6
        small = tree.num_bytes([state.replay.cursor, state.replay.size, state.hyper])
        assert carried == tree.num_bytes(state) - small


def test_constants_are_those_of_the_modules_that_use_them():
    """What this module cannot import, it has right."""
    assert (memory.ACT_BLOCK, memory.MOST_BLOCKS) == (dqn.ACT_BLOCK, dqn.MOST_BLOCKS)
    assert memory.STEPS_PER_CHECK == evaluate._STEPS_PER_CHECK
    assert memory.COPIED_BYTES == run.COPIED_BYTES
    assert EpisodeLog(1).limit == memory.MOST_EPISODES
    assert train.most_episodes(replace(SMALL, log_interval=0, total_timesteps=10**9)) == 2**20
    for states in (memory.SOLVED_STATES, memory.SOLVED_STATES + 1):
        env = make_env("LineWorld-v0", {"n_states": states})
        solved = exact.solve(env, [0.5]) is not None
        assert (Layout.of(env).num_states > 0) == solved


@given(
    num_seeds=st.integers(1, 50),
    num_envs=st.integers(1, 5_000),
    batch_size=st.integers(1, 500),
    train_freq=st.integers(1, 100),
    gradient_steps=st.integers(0, 10),
)
def test_windows_are_those_of_the_plan(**settings):
    """As many vector steps of noise are counted as `make_plan` lets the run draw at once."""
    args, env = replace(SMALL, total_timesteps=10**7, **settings), make_env("CartPole-v1")
    m, n = args.num_seeds, args.num_envs
    updates = args.gradient_steps * -(-n // args.train_freq)
    numbers = m * (n * 6 + 2 * updates * args.batch_size)
    window = min(make_plan(args, env).max_window_steps, -(-args.total_timesteps // n))
    expected = 4 * numbers * (window + min(window, args.chunk_steps))
    assert memory_needs(args, env, CPU).kept["noise"] == expected


# ----------------------------------------------------------------------------------- what is free


def host(root: Path, groups: str = "", **files: str) -> Path:
    """A machine's `proc` and `sys` under `root`: 8 000 kB available, and control groups' files."""
    files = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:   8000 kB\n", **files}
    for name, text in {**files, "proc/self/cgroup": groups}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(folder: str, limit: object, usage: int, inactive: int = 0, v1: bool = False) -> dict:
    """The files of a memory control group."""
    names = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
    limits, used, line = names if v1 else ("max", "current", "inactive_file")
    folder = f"sys/fs/cgroup/{folder}"
    return {
        f"{folder}/memory.{limits}": f"{limit}\n",
        f"{folder}/memory.{used}": f"{usage}\n",
        f"{folder}/memory.stat": f"anon 5\n{line} {inactive}\nother 7\n",
    }


def test_the_host_says_what_is_available(tmp_path):
    """MemAvailable, where no group has a limit."""
    assert free_on_host(host(tmp_path)) == 8_000 * 1024
    assert free_on_host(host(tmp_path, "0::/\n", **group("", "max", 9))) == 8_000 * 1024


@pytest.mark.parametrize("unified", ["", "unified/"])
def test_a_control_group_limits_it(tmp_path, unified):
    """Limit less usage, where file pages that can be given up count as free; version 2, also where
    version 1 is mounted beside it."""
    files = group(f"{unified}job", 1_000_000, 600_000, 50_000)
    assert free_on_host(host(tmp_path, "0::/job\n", **files)) == 450_000


def test_a_group_around_it_limits_it_too(tmp_path):
    """The tightest counts, and one that is overdrawn leaves nothing."""
    files = group("outer", 500_000, 400_000) | group("outer/job", "max", 300_000)
    assert free_on_host(host(tmp_path, "0::/outer/job\n", **files)) == 100_000
    files |= group("outer", 300_000, 400_000)
    assert free_on_host(host(tmp_path, "0::/outer/job\n", **files)) == 0


def test_control_groups_of_version_1(tmp_path):
    """The line of the memory controller; 2**63 less a page is no limit."""
    lines = "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n"
    files = group("memory", 9223372036854771712, 10, v1=True)
    assert free_on_host(host(tmp_path, lines, **files)) == 8_000 * 1024
    files |= group("memory/job", 700_000, 600_000, 20_000, v1=True)
    assert free_on_host(host(tmp_path, lines, **files)) == 120_000


def test_in_a_container_the_root_is_the_group(tmp_path):
    """The path is the host's, of which nothing is to be seen here."""
    files = group("", 300_000, 100_000)
    assert free_on_host(host(tmp_path, "0::/system.slice/box-17\n", **files)) == 200_000
    assert free_on_host(host(tmp_path, "0::/../other\n", **files)) == 200_000


def test_without_proc_the_system_is_asked(tmp_path, monkeypatch):
    """Free pages where they are counted, else all; not known where it counts none."""
    counts = {"SC_AVPHYS_PAGES": 100, "SC_PHYS_PAGES": 300, "SC_PAGE_SIZE": 4096}

    def sysconf(name: str) -> int:
        if name not in counts:
            raise ValueError("unrecognized configuration name")
        return counts[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert free_on_host(tmp_path) == 100 * 4096
    del counts["SC_AVPHYS_PAGES"]
    assert free_on_host(tmp_path) == 300 * 4096
    del counts["SC_PHYS_PAGES"]
    assert free_on_host(tmp_path) is None


def test_on_cuda_what_the_allocator_holds_unused_is_free(monkeypatch):
    """The card's free memory and what is reserved and not allocated."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_000, 5_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert free_memory(CUDA) == 1_100


def test_what_is_free_here():
    """A sensible number on a machine that runs these tests; nothing for a device without one."""
    assert 2**20 < (free_memory(CPU) or 2**30) < 2**50
    assert free_memory(torch.device("meta")) is None


# -------------------------------------------------------------------------------------- refusals


def test_what_fits_is_not_refused(monkeypatch):
    """Up to the last byte; and nothing is where it is not known what is free."""
    env = make_env("LineWorld-v0")
    total = memory_needs(SMALL, env, CPU).total
    set_free(monkeypatch, total)
    check_memory(SMALL, env, CPU)
    set_free(monkeypatch, total - 1)
    refusal(SMALL)
    set_free(monkeypatch, None)
    check_memory(replace(SMALL, buffer_size=10**30), env, CPU)


def test_a_refusal_in_words(monkeypatch):
    """Flag, value, the largest value that fits, free memory of the device, memory of the run."""
    set_free(monkeypatch, 20_100_000_000)
    args = replace(SMALL, num_seeds=1, buffer_size=2**32 - 1)
    assert re.fullmatch(
        r"--buffer-size 4294967295: must be at most 2,[34]\d0,000,000 to fit into the 20\.1 GB "
        r"free on cpu; this run needs 3[45]\.\d GB",
        refusal(args),
    )
    assert "free on cuda:0; " in refusal(args, device=CUDA)
    set_free(monkeypatch, 150_000_000)
    assert "the 150.0 MB free on cpu" in refusal(args)


TOO_LARGE = {
    "buffer_size": [replace(SMALL, buffer_size=10**12), Args(buffer_size=2**31)],
    "num_seeds": [replace(SMALL, num_seeds=10**7), Args(num_seeds=10**5, buffer_size=64)],
    "num_envs": [
        Args(num_envs=3 * 10**7, buffer_size=3 * 10**7, total_timesteps=10**9, train_freq=10**6)
    ],
    "batch_size": [
        replace(SMALL, batch_size=10**7, buffer_size=10**7, total_timesteps=10**9),
        Args(batch_size=10**7, buffer_size=10**7, total_timesteps=10**9, train_freq=10**6),
    ],
    "hidden_sizes": [replace(SMALL, hidden_sizes=(64, 10**9, 30)), Args(hidden_sizes=(10**5,) * 2)],
    "eval_episodes": [replace(SMALL, eval_episodes=10**9), Args(eval_episodes=10**8)],
}


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("env_id", ["LineWorld-v0", "CartPole-v1"])
@pytest.mark.parametrize("free", [2 * 10**9, 3 * 10**9])
@pytest.mark.parametrize(
    ("flag", "args"), [(flag, args) for flag, many in TOO_LARGE.items() for args in many]
)
def test_what_is_proposed_fits(flag, args, free, env_id, device, monkeypatch):
    """It passes both checks, and a step more in its last digit does not fit."""
    env = make_env(env_id)
    set_free(monkeypatch, free)
    check(args)
    text = refusal(args, env, device)
    name = flag.replace("_", "-")
    found = re.match(rf"--{name} (.*): must be at most ([\d,]+)( each)? to fit into", text)
    assert found, text
    most = int(found[2].replace(",", ""))
    step = 10 ** max(int(math.log10(most)) - 2, 0)
    assert most % step == 0

    def proposed(value: int) -> Args:
        if flag == "hidden_sizes":
            return replace(args, hidden_sizes=tuple(min(h, value) for h in args.hidden_sizes))
        return replace(args, **{flag: value})

    check(proposed(most))
    check_memory(proposed(most), env, device)
    assert memory_needs(proposed(most + step), env, device).total > free


@given(
    free=st.integers(10**8, 10**12),
    num_seeds=st.integers(1, 10**4),
    num_envs=st.integers(1, 10**7),
    buffer_size=st.integers(10**7, 10**13),
    batch_size=st.integers(1, 10**6),
    width=st.integers(1, 10**5),
    eval_episodes=st.integers(1, 10**7),
)
def test_a_refusal_is_true_whatever_is_asked_for(free, width, **settings):
    """The value proposed fits, and so do several settings together that are called too large."""
    args = replace(SMALL, hidden_sizes=(width, 64), total_timesteps=10**8, **settings)
    env = make_env("LineWorld-v0")
    with pytest.MonkeyPatch.context() as patch:
        set_free(patch, free)
        if memory_needs(args, env, CPU).total <= free:
            check_memory(args, env, CPU)
            return
        text = refusal(args, env)
        single = re.match(r"--([a-z-]+) [^:]*: must be at most ([\d,]+)", text)
        if single is None:
            assert ": must all be smaller to fit into" in text or "--device cpu" in text
            return
        name, most = single[1].replace("-", "_"), int(single[2].replace(",", ""))
        value = tuple(min(h, most) for h in args.hidden_sizes) if "hidden" in name else most
        check(replace(args, **{name: value}))
        check_memory(replace(args, **{name: value}), env, CPU)


@pytest.mark.parametrize("size", [10**18, 2**63, 10**22, 10**400])
@pytest.mark.parametrize(
    "name", ["buffer_size", "num_seeds", "eval_episodes", "hidden_sizes", "num_envs", "batch_size"]
)
def test_numbers_of_any_size_are_refused_at_once(name, size, monkeypatch):
    """No overflow, no allocation, within milliseconds of the processor's time."""
    set_free(monkeypatch, 10**10)
    large = {"num_envs": ("num_envs", "buffer_size"), "batch_size": ("batch_size", "buffer_size")}
    values = dict.fromkeys(large.get(name, (name,)), size)
    if name == "hidden_sizes":
        values = {name: (size, size)}
    began = time.thread_time()
    text = refusal(replace(SMALL, total_timesteps=max(1_000, size), **values))
    assert f"--{name.replace('_', '-')} " in text
    assert time.thread_time() - began < 0.5


def test_several_that_are_too_large_are_named_together(monkeypatch):
    """Where none alone is enough, exactly those that must be smaller."""
    set_free(monkeypatch, 10**10)
    text = refusal(replace(SMALL, num_seeds=10**6, hidden_sizes=(10**9,)))
    assert text.startswith(
        "--num-seeds 1000000 --hidden-sizes (1000000000,): must all be smaller to fit"
    )
    args = replace(SMALL, num_envs=10**12, buffer_size=10**15, total_timesteps=10**15)
    assert re.match(r"--buffer-size \d+ --num-envs \d+: must all be smaller", refusal(args))


@pytest.mark.parametrize("size", [10**9, 2**53])
@pytest.mark.parametrize("name", ["gradient_steps", "sweep_random"])
def test_counts_of_any_size_are_refused_at_once(name, size, monkeypatch):
    """Gradient steps and drawn settings too."""
    set_free(monkeypatch, 10**10)
    args = replace(SMALL, sweep={"gamma": (0.5, 0.9)}, **{name: size})
    assert ("--gradient-steps " if name == "gradient_steps" else "--sweep ") in refusal(args)


def test_counts_that_no_counter_holds_are_refused(monkeypatch):
    """Gradient steps of the whole run above 2**62."""
    set_free(monkeypatch, 10**10)
    args = replace(SMALL, total_timesteps=2**53, gradient_steps=1_000)
    assert refusal(args).startswith("--gradient-steps 1000: must be at most 255 with")
    check_memory(replace(args, gradient_steps=255), make_env(args.env_id), CPU)


@pytest.mark.parametrize("max_steps", [10_000_001, 2**31, 2**63, 10**30])
@pytest.mark.parametrize("env_id", ["LineWorld-v0", "CartPole-v1", "FrozenLake-v1", "gym:Taxi-v4"])
def test_a_time_limit_that_no_evaluation_reaches_is_refused(max_steps, env_id):
    """For every environment, by the name of its parameter, before anything is made."""
    name = "max_episode_steps" if env_id.startswith("gym") else "max_steps"
    params = {name: max_steps}
    args = replace(SMALL, env_id=env_id, env_params=params)
    with pytest.raises(ValueError) as error:
        setup.setup(args)
    assert str(error.value).startswith(f"--env-params {name} {max_steps}: must be at most ")


def test_more_processes_than_pipes_are_refused(monkeypatch):
    """As many copies as the limit of open files has room for."""
    set_free(monkeypatch, None)
    monkeypatch.setattr("resource.getrlimit", lambda kind: (1_024, 4_096))
    env = make_env("gym:CartPole-v1", {}, "async")
    text = refusal(replace(SMALL, num_seeds=2, num_envs=150, buffer_size=150), env)
    assert text.startswith("--num-envs 150: must be at most 149 with --vectorization-mode async")
    check_memory(replace(SMALL, num_seeds=2, num_envs=149, buffer_size=150), env, CPU)
    check_memory(replace(SMALL, num_envs=150, buffer_size=150), make_env("gym:CartPole-v1"), CPU)


def test_an_environment_that_is_too_large_is_named(monkeypatch):
    """Where no setting is, its parameters are."""
    set_free(monkeypatch, 2 * 10**8)
    env = make_env("LineWorld-v0", {"n_states": 2**20})
    args = replace(SMALL, hidden_sizes=(8,), env_params={"n_states": 2**20})
    assert refusal(args, env).startswith(
        "--env-params n_states 1048576: must make a smaller environment to fit into the 200.0 MB"
    )


def test_an_evaluation_that_is_too_large_is_refused(monkeypatch):
    """As many episodes as proposed fit; copies on the host count."""
    set_free(monkeypatch, 10**9)
    for env_id in ("LineWorld-v0", "gym:CartPole-v1"):
        env = make_env(env_id)
        with pytest.raises(ValueError) as error:
            memory.check_evaluation(env, 2, 2**53, (32,), CPU)
        found = re.match(
            r"--episodes 9007199254740992: must be at most ([\d,]+) to", str(error.value)
        )
        assert found
        most = int(found[1].replace(",", ""))
        assert most < 10**9 / 2 / (2**12 if env.on_host else 1)
        memory.check_evaluation(env, 2, most, (32,), CPU)


def test_a_limited_address_space_limits_what_is_free():
    """`ulimit -v`, less what the process holds."""
    script = (
        "import resource; from dqn_fast.memory import free_on_host;"
        "held = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize();"
        "resource.setrlimit(resource.RLIMIT_AS, (held + 10**8, resource.RLIM_INFINITY));"
        "print(free_on_host())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert 0 < int(done.stdout) <= 10**8


def test_without_room_for_a_copy_nothing_is_compiled(tmp_path, monkeypatch):
    """Compiled functions are tried on a copy of what is carried: a run that fits only without it
    runs plainly, and says so."""
    args = replace(SMALL, engine="compile", buffer_size=10**6, report=False, quiet=True)
    env = make_env(args.env_id)
    resolved = replace(args, **setup.intervals(args))
    set_free(monkeypatch, memory_needs(resolved, env, CPU).total)
    summary = train.train(replace(args, run_dir=tmp_path / "run")).summary
    assert summary["engine"] == "eager"
    assert summary["engine_reason"].startswith("too little memory to try compiled functions")


def test_a_device_that_holds_no_run_is_named(monkeypatch):
    """No setting is called too large where the smallest would be."""
    set_free(monkeypatch, 10**7)
    assert refusal(SMALL).startswith("--device cpu: must have more memory; no run fits into the 10")


def test_the_check_costs_next_to_nothing():
    """Below 5 ms of the processor's time for usual settings."""
    args, env = Args(), make_env("LineWorld-v0")
    times = []
    for _ in range(20):
        began = time.thread_time()
        check_memory(args, env, CPU)
        times.append(time.thread_time() - began)
    assert sorted(times)[len(times) // 2] < 5e-3


# --------------------------------------------------------------------------------------- reality

MEASURE = """
import sys
from pathlib import Path
import torch
from dqn_fast.envs import make_env
from dqn_fast.memory import memory_needs
from dqn_fast.train import Args, train

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

def run(number, **settings):
    settings = dict(quiet=True, device="cpu", engine="eager", report=False, **settings)
    train(Args(run_dir=Path(sys.argv[1]) / str(number), **settings))

settings = eval(f"dict({sys.argv[2]})")
run(0, total_timesteps=1_000)  # what is loaded once
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = resident("VmRSS")
run(1, **settings)
needs = memory_needs(Args(**settings), make_env("LineWorld-v0"), torch.device("cpu"))
print(resident("VmHWM") - before, needs.total, needs.kept["program"] + needs.kept["gaps"],
      needs.kept["files"],
      max(needs.parts.keys() - {"gaps", "program", "files"}, key=needs.parts.get))
"""
REAL = {
    "replay": "buffer_size=50_000_000, num_envs=2**16, total_timesteps=50_000_000, "
    "hidden_sizes=(2,), gradient_steps=0, log_interval=5_000_000, eval_interval=0, "
    "checkpoint_interval=0",
    "members": "num_seeds=64, hidden_sizes=(256, 256), total_timesteps=1_500, eval_interval=0",
    "gradient step": "batch_size=2**16, buffer_size=100_000, total_timesteps=70_000, "
    "train_freq=1_024, num_envs=1_024, eval_interval=0",
    "vector step": "num_envs=10**6, buffer_size=10**6, total_timesteps=2 * 10**6, "
    "train_freq=10**6, eval_interval=0",
    "evaluation": "eval_episodes=60_000, total_timesteps=2_000",
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    "part",
    [
        pytest.param(p, marks=pytest.mark.slow if p in ("evaluation", "members") else ())
        for p in REAL
    ],
)
def test_runs_take_what_was_computed(part, tmp_path):
    """The peak of the resident set grows by what was computed, within a quarter. Freed blocks go
    back at once here, so that no gaps are measured."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), REAL[part]],
        capture_output=True, text=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *numbers, largest = done.stdout.split(maxsplit=4)
    measured, total, other, files = map(int, numbers)
    assert largest.strip() == part
    # A copy of what is written may still be there when the next one is made, or not.
    assert 0.8 * measured < total - other
    assert total - other - files < 1.25 * measured
