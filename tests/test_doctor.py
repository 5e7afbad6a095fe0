"""Doctor: every trap is found in an environment that has it, and in no other."""

from __future__ import annotations

import json
import math
import os
import random
import stat
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from dqn_fast.doctor import adapted, machine, repeats, single, vector
from dqn_fast.doctor import packages as packages_module
from dqn_fast.doctor.__main__ import main
from dqn_fast.doctor.environment import check_environment, find
from dqn_fast.doctor.findings import Finding
from dqn_fast.doctor.packages import Declared, check_packages, declared
from dqn_fast.doctor.plays import BrokenError
from dqn_fast.envs import TensorEnv, make_env
from dqn_fast.settings import UsageError
from dqn_fast.train import Args
from tests.engines.runs import wait_until
from tests.engines.test_watched import lives

HERE = __name__


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Speeds are measured over moments: the numbers do not matter here. Plays end by their number
    of steps, also where the machine stalls."""
    monkeypatch.setattr(adapted, "SPEED_S", 0.01)
    for module, name in ((single, "MOST_S"), (repeats, "REPEAT_S"), (vector, "PLAY_S")):
        monkeypatch.setattr(module, name, 60.0)
    monkeypatch.setattr(adapted, "SCALAR_S", 60.0)
    monkeypatch.setattr(single, "ENOUGH_STEPS", 300)
    monkeypatch.setattr(single, "MOST_STEPS", 1_500)


class Walk(gymnasium.Env[Any, Any]):
    """A noisy walk on a line that ends far from 0, or by itself after 50 steps. It has no fault;
    its subclasses have one each."""

    observation_space: Any = spaces.Box(-2.0, 2.0, (2,), np.float32)
    action_space: Any = spaces.Discrete(2)
    noise = 0.1

    def begin(self) -> None:
        self.x, self.steps = self.np_random.uniform(-0.1, 0.1), 0

    def observe(self) -> Any:
        return np.array([self.x, self.steps / 50], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.begin()
        return self.observe(), {}

    def draw(self) -> float:
        return self.np_random.normal()

    def step(self, action: Any) -> Any:
        self.steps += 1
        self.x += 0.2 * (int(action) * 2 - 1) + self.noise * self.draw()
        return self.observe(), 1.0 - abs(self.x), self.ended(), self.cut(), {}

    def ended(self) -> Any:
        return bool(abs(self.x) > 1.0)

    def cut(self) -> Any:
        return self.steps >= 50


def trap(level: str, what: str, words: str = "") -> Any:
    """Declare what the doctor must say about a class, and nothing else."""

    def mark(cls: Any) -> Any:
        cls.expected = (level, what, words)
        TRAPS.append(cls)
        return cls

    return mark


TRAPS: list[Any] = []


@trap("note", "observation dtype", "float64, its space float32")
class WrongDtype(Walk):
    def observe(self):
        return np.array([self.x, 0.0])


@trap("note", "observation dtype", "float64 is stored")
class DoubleSpace(Walk):
    observation_space = spaces.Box(-2.0, 2.0, (2,), np.float64)

    def observe(self):
        return np.array([self.x, 0.0])


@trap("note", "observations", "number 1 was 5 in step 0")
class OutsideOfItsSpace(Walk):
    def observe(self):
        return np.array([self.x, 5.0], np.float32)


@trap("fault", "observation", "holds nan in step")
class NotANumber(Walk):
    def observe(self):
        return np.array([math.nan if self.steps == 3 else self.x, 0.0], np.float32)


@trap("note", "observation shape", "is read as 2,100 numbers")
class Picture(Walk):
    observation_space = spaces.Box(0, 255, (30, 70), np.uint8)

    def observe(self):
        return np.full((30, 70), int(100 + 50 * self.x), np.uint8)


@trap("fault", "observation", "its space has the shape (2,)")
class WrongShape(Walk):
    def observe(self):
        return np.zeros(3, np.float32)


@trap("fault", "observation", "is not in Discrete(4)")
class OutsideOfDiscrete(Walk):
    observation_space = spaces.Discrete(4)

    def observe(self):
        return 4


@trap("fault", "observation", "lacks 'speed'")
class MissingPart(Walk):
    observation_space = spaces.Dict(
        {"place": spaces.Box(-9, 9, (1,), np.float32), "speed": spaces.Discrete(3)}
    )

    def observe(self):
        return {"place": np.zeros(1, np.float32)}


@trap("fault", "reward", "is inf in step")
class EndlessReward(Walk):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, math.inf, *rest


@trap("fault", "reward", "must be a number")
class RewardInAList(Walk):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, [reward], *rest


@trap("fault", "terminated", "write bool(terminated)")
class FlagIsANumber(Walk):
    def ended(self):
        return int(super().ended())


@trap("fault", "reset", "must return (obs, info)")
class ResetWithoutInfo(Walk):
    def reset(self, **arguments):
        return super().reset(**arguments)[0]


@trap("fault", "reset", "its signature must be")
class ResetWithoutSeed(Walk):
    def reset(self):
        return super().reset()


@trap("note", "info", "reset returns the info None")
class NoInfo(Walk):
    def reset(self, **arguments):
        return super().reset(**arguments)[0], None


@trap("fault", "step", "the old gym")
class OldInterface(Walk):
    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated or truncated, info


@trap("fault", "step", "step 5 raises RuntimeError: fell off")
class Raises(Walk):
    def step(self, action):
        if self.steps == 4:
            raise RuntimeError("fell off")
        return super().step(action)


@trap("fault", "repeats", "differ in the first reset")
class IgnoresTheSeed(Walk):
    def reset(self, *, seed=None, options=None):
        self.np_random = np.random.default_rng()
        return super().reset()


@trap("fault", "repeats", "a reset without a seed")
class NewGeneratorWithoutSeed(Walk):
    def reset(self, *, seed=None, options=None):
        self.np_random = np.random.default_rng(seed)
        self.begin()
        return self.observe(), {}


@trap("fault", "repeats", "differ in step 1,")
class StepsWithOtherNumbers(Walk):
    def draw(self):
        return np.random.default_rng().normal()


@trap("fault", "global numbers", "generator of numpy.random")
class GlobalNumpy(Walk):
    def draw(self):
        return np.random.normal()  # noqa: NPY002


@trap("fault", "global numbers", "generator of random.")
class GlobalRandom(Walk):
    def draw(self):
        return random.gauss()


@trap("fault", "global numbers", "generator of torch")
class GlobalTorch(Walk):
    def draw(self):
        return float(torch.randn(()))


@trap("fault", "global numbers", "generator of numpy.random")
class SeedsTheGlobals(Walk):
    def reset(self, *, seed=None, options=None):
        if seed is not None:
            np.random.seed(seed)  # noqa: NPY002
        return super().reset(seed=seed)


@trap("note", "reset", "something survives reset")
class CountsOn(Walk):
    total = 0

    def begin(self):
        super().begin()
        self.total += 1
        self.x += 0.001 * self.total


@trap("fault", "copies", "share state")
class SharedByTheClass(Walk):
    place: ClassVar[list[float]] = [0.0]

    @property
    def x(self):
        return self.place[0]

    @x.setter
    def x(self, value):
        self.place[0] = value


@trap("fault", "seeds", "plays one episode for ever")
class StartsItsGeneratorAgain(Walk):
    seed = 0

    def reset(self, *, seed=None, options=None):
        self.seed = self.seed if seed is None else seed
        return super().reset(seed=self.seed)


@trap("fault", "last observation", "step calls reset")
class ResetsItself(Walk):
    def step(self, action):
        obs, *rest = super().step(action)
        if rest[1] or rest[2]:
            obs, _ = self.reset()
        return obs, *rest


@trap("note", "last observation", "looks like a first one")
class ResetsItselfUnseen(Walk):
    noise = 0.5

    def observe(self):
        return np.array([self.x, 0.0], np.float32)

    def step(self, action):
        _, *rest = super().step(action)
        if rest[1] or rest[2]:
            self.begin()
        return self.observe(), *rest

    def cut(self):
        return False


@trap("fault", "last observation", "step seems to reset")
class ResetsItselfFromOneStart(Walk):
    def begin(self):
        self.x, self.steps = 0.0, 0

    def step(self, action):
        _, *rest = super().step(action)
        if rest[1] or rest[2]:
            self.begin()
        return self.observe(), *rest

    def cut(self):
        return self.steps >= 9


@trap("note", "returned arrays", "a call of reset and of step overwrites")
class ReusesItsArray(Walk):
    def __init__(self):
        self.array = np.zeros(2, np.float32)

    def observe(self):
        self.array[:] = self.x, 0.0
        return self.array


@trap("note", "time limit", "no episode is over after 1,500 steps")
class NeverEnds(Walk):
    def step(self, action):
        self.x = float(np.clip(self.x, -0.5, 0.5))
        return super().step(action)

    def observe(self):
        return np.array([self.x, 0.0], np.float32)

    def ended(self):
        return False

    cut = ended


@trap("note", "time limit", "after exactly 50 steps")
class TerminatesAlwaysAtOnce(Walk):
    def observe(self):
        return np.clip(super().observe(), -2, 2)

    def ended(self):
        return self.steps >= 50

    def cut(self):
        return False


@trap("fault", "time limit", "truncated comes only together with terminated")
class MergesItsFlags(Walk):
    def ended(self):
        return bool(abs(self.x) > 1.0) or self.steps >= 8

    cut = ended


@trap("note", "async", "play differently")
class DependsOnItsProcess(Walk):
    owner = os.getpid()

    def step(self, action):
        self.x += 0.01 * (os.getpid() != self.owner)
        return super().step(action)


@trap("note", "actions", "there is only one")
class OneAction(Walk):
    action_space = spaces.Discrete(1)


class StartsItsActionsAtFive(Walk):
    """Without fault."""

    action_space = spaces.Discrete(2, start=5)

    def step(self, action):
        assert action in self.action_space
        return super().step(action - 5)


@trap("note", "last observation", "if the task ends where it starts, all is well")
class EndsWhereItStarts(Walk):
    """As a task may; this cannot be told from an environment that resets itself."""

    observation_space = spaces.Discrete(7)

    def begin(self):
        self.x, self.steps = 0, 0

    def observe(self):
        return int(self.x) % 7

    def step(self, action):
        self.steps += 1
        self.x += int(action) + 1
        return self.observe(), 0.0, bool(self.x % 7 == 0), self.steps >= 50, {}


class Continuous(Walk):
    action_space = spaces.Box(-1, 1, (2,))


class Words(Walk):
    observation_space = spaces.Sequence(spaces.Discrete(3))


class CannotBeMade(Walk):
    def __init__(self):
        raise RuntimeError("no board")


class Holds(Walk):
    """Without fault, but it is made with a lock."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock


with_lock = partial(Holds, threading.Lock())


def checked(name: str, **params: Any) -> list[Finding]:
    """All findings about an environment of this file."""
    subject = find(None, f"{HERE}:{name}", params)
    run = Args(num_envs=4, batch_size=8, hidden_sizes=(8,), train_freq=4)
    try:
        return list(check_environment(subject, run))
    finally:
        subject.env.close()


def remarks(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.what) for finding in remarked(findings)]


def remarked(findings: list[Finding]) -> list[Finding]:
    """Notes and faults, but for the share of the environments in training: it is measured."""
    return [f for f in findings if f.level != "ok" and f.what != "training"]


@pytest.mark.parametrize("cls", TRAPS, ids=lambda cls: cls.__name__)
def test_a_trap_is_named_and_no_other(cls):
    """One remark, of its level, about it, with its words."""
    level, what, words = cls.expected
    findings = checked(cls.__name__)
    assert remarks(findings) == [(level, what)]
    assert words in remarked(findings)[0].words


@pytest.mark.parametrize("name", ["Walk", "StartsItsActionsAtFive"])
def test_an_environment_without_fault_gets_no_remark(name):
    """Neither note nor fault, and each check was made."""
    findings = checked(name)
    assert remarks(findings) == []
    assert {"repeats", "copies", "seeds", "adapted", "async", "pickle", "speed adapted"} <= {
        finding.what for finding in findings
    }


@pytest.mark.parametrize(
    "env_id",
    [
        "CartPole-v1", "gym:CartPole-v1", "gym:MountainCar-v0", "gym:Acrobot-v1", "FrozenLake-v1",
        "gym:FrozenLake-v1", "Blackjack-v1", "gym:Taxi-v4",
    ],
)  # fmt: skip
def test_environments_of_gymnasium_raise_no_alarm(env_id):
    """No fault, and no note but the one about the tensor version."""
    subject = find(env_id, None, {})
    run = Args(num_envs=4, batch_size=8, hidden_sizes=(8,), train_freq=4)
    findings = list(check_environment(subject, run))
    assert remarks(findings) in ([], [("note", "tensor version")])


def register_walks() -> None:
    """Walks with a registered time limit, registered once."""
    for name, cls in (("Cut", Walk), ("Ends", TerminatesAlwaysAtOnce)):
        if f"DoctorTest{name}-v0" not in gymnasium.registry:
            gymnasium.register(
                f"DoctorTest{name}-v0", entry_point=f"{HERE}:{cls.__name__}", max_episode_steps=50
            )


register_walks()


def test_a_registered_time_limit_that_comes_as_terminated_is_a_fault():
    """Trap 1: every episode of that length ended with terminated."""
    args = Args(num_envs=4, batch_size=8)
    for name, expected in (("Cut", []), ("Ends", [("fault", "time limit")])):
        subject = find(None, f"{HERE}:DoctorTest{name}-v0", {})
        assert remarks(list(check_environment(subject, args))) == expected


def test_copies_that_cannot_be_pickled_are_noted():
    """They work in forked processes, and cannot be sent to others."""
    assert remarks(checked("with_lock")) == [("note", "pickle")]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Continuous", "is not Discrete, as DQN needs it"),
        ("Words", "has no fixed size"),
        ("CannotBeMade", "cannot be made: RuntimeError: no board"),
    ],
)
def test_environments_that_cannot_be_played_are_a_fault(name, words):
    """A fault about making it, with the reason."""
    with pytest.raises(BrokenError) as caught:
        find(None, f"{HERE}:{name}", {})
    assert (caught.value.finding.level, caught.value.finding.what) == ("fault", "made")
    assert words in caught.value.finding.words


def test_the_doctor_leaves_the_global_generators_alone():
    """Also when the environment uses them."""
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    checked("GlobalNumpy")
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


# ----------------------------------------------------------------------------------- VectorEnvs


class Vector(VectorEnv[Any, Any, Any]):
    """Copies that count to their own length in NEXT_STEP mode; `mode` is what it declares."""

    mode: Any = AutoresetMode.NEXT_STEP
    behaves = AutoresetMode.NEXT_STEP

    def __init__(self, num_envs: int = 3) -> None:
        self.num_envs = num_envs
        self.metadata = {} if self.mode is None else {"autoreset_mode": self.mode}
        self.single_observation_space = spaces.Box(0, 100, (1,), np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = spaces.Box(0, 100, (num_envs, 1), np.float32)
        self.action_space = spaces.MultiDiscrete([2] * num_envs)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.count = np.zeros(self.num_envs, np.int64)
        self.done = np.zeros(self.num_envs, np.bool_)
        return self.observe(), {}

    def observe(self) -> Any:
        return self.count.astype(np.float32)[:, None]

    def step(self, actions: Any) -> Any:
        fresh = self.done if self.behaves is AutoresetMode.NEXT_STEP else np.zeros_like(self.done)
        self.count = np.where(fresh, 0, self.count + 1)
        done = self.count >= np.arange(3, 3 + self.num_envs)
        reward = np.where(fresh, 0.0, 1.0)
        infos: dict[str, Any] = {}
        if self.behaves is AutoresetMode.SAME_STEP and done.any():
            infos = {"final_obs": self.observe(), "_final_obs": done}
            self.count = np.where(done, 0, self.count)
        self.done = done
        return self.observe(), reward, done, np.zeros_like(done), infos


class Undeclared(Vector):
    mode = None


class SameStep(Vector):
    mode = behaves = AutoresetMode.SAME_STEP


class SameStepDeclaredNextStep(SameStep):
    mode = AutoresetMode.NEXT_STEP


class SameStepWithoutLast(SameStep):
    def step(self, actions: Any) -> Any:
        return *super().step(actions)[:4], {}


class GoesOn(Vector):
    """Continues with the next episode, as if the reset had taken no step."""

    def step(self, actions: Any) -> Any:
        self.count = np.where(self.done, 0, self.count)
        self.done = np.zeros_like(self.done)
        return super().step(actions)


class Unrepeatable(Vector):
    def observe(self) -> Any:
        return super().observe() + np.random.default_rng().random((self.num_envs, 1), np.float32)


class OneFlag(Vector):
    def step(self, actions: Any) -> Any:
        obs, reward, done, _, infos = super().step(actions)
        return obs, reward, done, False, infos


def reused_arrays(num_envs: int) -> Any:
    return SyncVectorEnv([ReusesItsArray] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def walks(num_envs: int, mode: AutoresetMode) -> Any:
    return SyncVectorEnv([Walk] * num_envs, autoreset_mode=mode)


class Walks:
    """Callables, one for each mode; `ready` is a VectorEnv."""

    next_step, same_step, disabled = (
        lambda num_envs, mode=mode: walks(num_envs, mode) for mode in AutoresetMode
    )


def test_an_undeclared_autoreset_is_a_fault():
    """The line says what to declare."""
    with pytest.raises(BrokenError, match=r"does not declare when it resets .* set it to one of"):
        checked("Undeclared")


@pytest.mark.parametrize(
    ("name", "expected", "words"),
    [
        ("Vector", [], ""),
        ("SameStep", [], ""),
        ("Walks.next_step", [], ""),
        ("Walks.same_step", [], ""),
        ("Walks.disabled", [], ""),
        ("SameStepDeclaredNextStep", [("fault", "autoreset")], "declares NEXT_STEP"),
        ("SameStepWithoutLast", [("fault", "autoreset"), ("fault", "adapted")], "lacks"),
        ("GoesOn", [("fault", "autoreset")], "the step after an end brings rewards"),
        ("Unrepeatable", [("fault", "repeats")], "differ in the first reset"),
        ("OneFlag", [("fault", "truncated")], "must be bool [4]"),
        ("reused_arrays", [("fault", "autoreset")], "reset writes into the array"),
    ],
)
def test_autoreset_of_a_vector_env(name, expected, words):
    """Wrong declarations are named; the three modes of Gymnasium are right."""
    findings = checked(name)
    assert remarks(findings) == expected
    assert any(words in finding.words for finding in findings)


# -------------------------------------------------------------------------- tensor environments


class At(NamedTuple):
    x: torch.Tensor


@dataclass(frozen=True)
class Tensors(TensorEnv):
    """A walk as tensors, without fault unless `twice`."""

    stride: float = 0.25
    wrong: bool = False
    max_steps: int = 20
    num_actions: ClassVar[int] = 2
    reset_noise_dim: ClassVar[int] = 1

    def reset(self, noise: torch.Tensor) -> At:
        return At(noise[:, 0])

    def step(self, state: At, action: torch.Tensor, noise: torch.Tensor) -> Any:
        x = state.x + self.stride * (2 * action - 1)
        reward = torch.rand_like(x) if self.wrong else x
        return At(x), reward, x.abs() > 1

    def observe(self, state: At) -> torch.Tensor:
        return state.x[:, None]


ready = Tensors()


@pytest.mark.parametrize("name", ["Tensors", "ready"])
def test_a_tensor_environment_is_checked_by_its_rules(name):
    """A class or an object; the findings have its speed and its bytes."""
    findings = checked(name)
    assert remarks(findings) == []
    assert {"rules", "observations", "speed adapted", "training", "replay"} == {
        finding.what for finding in findings
    }
    assert "14 bytes a transition" in findings[-1].words


def test_parameters_have_the_types_of_the_fields():
    """As on the command line: text becomes a number or a truth value."""
    subject = find(None, f"{HERE}:Tensors", {"stride": "0.5", "wrong": "true"})
    assert subject.env == Tensors(0.5, True)
    assert remarks(checked("Tensors", wrong="true")) == [("fault", "rules")]
    with pytest.raises(UsageError, match="no such parameter; it has stride, wrong, max_steps"):
        find(None, f"{HERE}:Tensors", {"colour": "red"})


# ----------------------------------------------------------------------------------- the machine


def levels(findings: Any) -> list[str]:
    return [finding.level for finding in findings]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_quota_of_cores_is_the_least_of_all_groups(tmp_path):
    """Of both versions of control groups, parents included; without any, there is none."""
    assert machine.cpu_quota(tmp_path) is None
    write(tmp_path / "proc/self/cgroup", "3:cpu,cpuacct:/job\n0::/jobs/one\n")
    groups = tmp_path / "sys/fs/cgroup"
    assert machine.cpu_quota(tmp_path) is None
    write(groups / "jobs/one/cpu.max", "max 100000\n")
    assert machine.cpu_quota(tmp_path) is None
    write(groups / "jobs/cpu.max", "250000 100000\n")
    assert machine.cpu_quota(tmp_path) == 2.5
    write(groups / "cpu/job/cpu.cfs_quota_us", "150000\n")
    write(groups / "cpu/job/cpu.cfs_period_us", "100000\n")
    assert machine.cpu_quota(tmp_path) == 1.5


def test_more_threads_than_cores_are_noted():
    """Of this process's cores."""
    assert levels(machine.check_cpu(1))[-1] == "ok"
    assert levels(machine.check_cpu(10_000))[-1] == "note"


def test_cards_are_counted_without_torch(tmp_path):
    """From the driver's list, so a build without CUDA can say that it ignores them."""
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "proc/driver/nvidia/gpus" / name).mkdir(parents=True)
    assert machine.nvidia_cards(tmp_path) == 2


def test_the_compiler_is_really_used(tmp_path, monkeypatch):
    """It works here, or the note says what is wrong: not found, failing, or too slow."""
    (found,) = machine.check_compiler()
    assert found.level == "ok", found
    monkeypatch.setenv("CXX", "no-such-compiler")
    (missing,) = machine.check_compiler()
    assert missing.level == "note"
    assert "no-such-compiler is not found" in missing.words

    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "x: error: bad" >&2; exit 1; }\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    (failing,) = machine.check_compiler()
    assert failing.level == "note"
    assert "(x: error: bad)" in failing.words


def test_a_compiler_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    """After the time limit; nothing of it runs on."""
    script = tmp_path / "compiler"
    child = tmp_path / "child"
    script.write_text(
        f"#!/bin/sh\n[ $1 = --version ] && exit\nsleep 600 & echo $! >{child}; wait\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    began = time.monotonic()
    for seconds in (0.3, 3.0, 10.0):  # until it has begun before its end
        monkeypatch.setattr(machine, "COMPILER_S", seconds)
        (finding,) = machine.check_compiler()
        assert f"no result after {seconds:g} s" in finding.words
        if child.exists() and child.read_text().endswith("\n"):
            break
    assert time.monotonic() - began < 50
    wait_until(lambda: not lives(int(child.read_text())), 20)


def test_a_compile_cache_that_others_may_write_is_noted(tmp_path, monkeypatch):
    """So is a link; our own folder is fine, and is made where there is none."""
    folder = tmp_path / "dqn_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert levels(machine.check_cache()) == ["ok"]
    folder.chmod(folder.stat().st_mode | stat.S_IWOTH)
    (shared,) = machine.check_cache()
    assert (shared.level, "can be written by other users" in shared.words) == ("note", True)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    (link,) = machine.check_cache()
    assert (link.level, "is a symbolic link" in link.words) == ("note", True)


def test_a_folder_that_cannot_be_written_is_a_fault(tmp_path):
    """And one that can is ok or short of room."""
    file = tmp_path / "file"
    file.write_text("")
    assert levels(machine.check_folder("x", lambda: file, "choose another")) == ["fault"]
    assert levels(machine.check_folder("x", lambda: tmp_path, "choose another")) != ["fault"]
    assert list(tmp_path.iterdir()) == [file]


def test_a_run_that_does_not_fit_is_a_fault():
    """With the line that training would print."""
    env = make_env("LineWorld-v0")
    (fits,) = machine.check_fit(Args(), env, "LineWorld-v0")
    assert fits.level == "ok"
    (large,) = machine.check_fit(Args(buffer_size=10**13), env, "LineWorld-v0")
    assert large.level == "fault"
    assert large.words.startswith("--buffer-size 10000000000000: must be at most")


@pytest.mark.parametrize(
    ("variables", "level", "words"),
    [
        ({"WANDB_MODE": "offline"}, "ok", "offline, as WANDB_MODE"),
        ({"WANDB_BASE_URL": "http://127.0.0.1:9"}, "note", "no API key for http://127.0.0.1:9"),
        (
            {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40},
            "note",
            "http://127.0.0.1:9 does not answer",
        ),
    ],
)
def test_wandb_says_where_a_run_would_be_recorded(variables, level, words, tmp_path, monkeypatch):
    """Without a key or an answer: offline, and how to log in."""
    import wandb

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    (finding,) = machine.check_wandb()
    wandb.teardown()
    assert finding.level == level, finding
    assert words in finding.words


# -------------------------------------------------------------------------------------- packages


def test_versions_are_compared_with_the_declared_ranges():
    """Missing and too old: fault; newer than tested: note; extras are named, not required."""
    wanted = Declared(
        ">=3.11",
        ["torch>=2.11", "numpy<1", "gymnasium>=99", "no-such-package>=1"],
        {"video": ["pillow>=10", "no-such-extra>=1"], "test": ["also-missing"]},
    )
    found = {finding.what: finding for finding in check_packages(wanted)}
    assert {name: finding.level for name, finding in found.items()} == {
        "python": "ok", "packages": "ok", "numpy": "note", "gymnasium": "fault",
        "no-such-package": "fault", "extras": "ok",
    }  # fmt: skip
    assert f"torch {torch.__version__}" in found["packages"].words
    assert "no-such-extra (pip install" in found["extras"].words
    assert "also-missing" not in found["extras"].words


def test_the_ranges_are_those_of_the_project(tmp_path):
    """Of the checkout, else of the installed package."""
    here = declared()
    assert here is not None
    assert any(requirement.startswith("jinja2") for requirement in here.required)
    installed = declared(tmp_path / "pyproject.toml")
    assert installed is not None
    assert any(requirement.startswith("torch<") for requirement in installed.required)
    assert "video" in installed.extras


# ---------------------------------------------------------------------------------- command line


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["doctor", *arguments])
    return main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--env-id Nope-v3", "--env-id Nope-v3: unknown environment"),
        ("--env-id no_such_module:Env-v0", "no_such_module cannot be imported"),
        ("--env-id json:Env-v0", "json registers no such id"),
        ("--env json", "--env json: must be module:name"),
        ("--env json:nothing", "--env json:nothing: json has no nothing and registers no such id"),
        ("--env json:__name__", "--env json:__name__: is str; must be an environment's class"),
        ("--env math:pi", "--env math:pi: is float; must be"),
        ("--env-id CartPole-v1 --env-params colour red", "--env-params colour red: CartPole-v1"),
        ("--env-params length 1", "--env-params length: needs --env-id or --env"),
        ("--env-id CartPole-v1 --env a:b", "must not be given together with --env-id"),
        ("--num-threads -1", "--num-threads -1: must be at least 0"),
        ("--device quantum", "--device quantum: not available here"),
    ],
)
def test_bad_input_is_one_line(arguments, message, monkeypatch, capsys):
    """Exit status 2, nothing on stdout."""
    assert run_main(monkeypatch, *arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_the_last_line_is_json_and_the_status_says_whether_there_is_a_fault(monkeypatch, capsys):
    """Every finding is a line of its own, and once more in the JSON."""
    assert run_main(monkeypatch, "--env", f"{HERE}:ResetsItself", "--json") == 1
    *lines, verdict, last = capsys.readouterr().out.splitlines()
    told = json.loads(last)
    assert told["faults"] == 1
    assert verdict == f"1 fault(s), {told['notes']} note(s)"
    assert [line.split()[0] for line in lines] == [row["level"] for row in told["findings"]]
    whats = [row["what"] for row in told["findings"]]
    assert whats[:2] == ["python", "packages"]
    assert {"cores", "C++ compiler", "compile cache", "memory", "wandb", "engine"} <= set(whats)
    assert [row["what"] for row in told["findings"] if row["level"] == "fault"] == [
        "last observation"
    ]


def test_a_missing_package_is_named_without_a_traceback():
    """Exit status 1; nothing else is imported first."""
    code = (
        "import runpy, sys; sys.modules['tyro'] = None; "
        "runpy.run_module('dqn_fast.doctor', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "fault  tyro" in done.stdout
    assert "pip install 'tyro>=0.9'" in done.stdout
    assert packages_module.PROJECT.exists()
