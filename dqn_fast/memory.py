"""Memory of a run, computed from its settings before the first tensor is made.

    check_memory(args, env, device)  # ValueError: one line that names the flag and what fits

The shape of every tensor follows from the settings, so its bytes are arithmetic on whole numbers of
any size. Nothing is allocated in proportion to a setting: one copy of the environment shows shapes
and dtypes. What else takes memory is a constant for each device: libraries that are loaded later,
workspaces of matrix products, gaps between allocations.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dqn_fast.algorithm import UPDATE_METRICS
from dqn_fast.envs import TabularEnv, TensorEnv
from dqn_fast.record.diagnostics import MOST_SNAPSHOTS, SAMPLE_SIZE
from dqn_fast.record.metrics import Metrics

PROGRAM = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
"""What a run takes beside its tensors, by type of device. CPU: measured 28 MB, and 66 MB with the
report. CUDA: an estimate, for kernels, which are loaded when first called, and cuBLAS."""

HOST_COPY, WORKER = 4 * 2**10, 4 * 2**20
"""What a copy of an environment outside torch takes at least, in this process and in one of its
own: measured 4 to 27 KB for five of Gymnasium's, and 4.8 MB."""

ROOT = Path("/")

GAPS = 256 * 2**20
"""Freed memory that a CPU's allocator keeps at most. glibc puts blocks below 32 MiB into a heap, in
which later ones leave gaps: measured up to 300 MB, and nothing with larger blocks."""

# Equal to what they stand for in modules of later layers, or that keep theirs to themselves; a test
# compares them.
COPIED_BYTES = 2**28
"""Size up to which a checkpoint is copied and written beside the loop, see `run.RunRecord.save`."""
ACT_BLOCK, MOST_BLOCKS = 1_024, 16
"""Env copies whose Q-values a CPU computes at a time, see `train.q_of_copies`."""
NUMBERS_AT_ONCE = 2**19
"""Random numbers that are drawn at once, see `train.make_plan`; one vector step may take more."""
STEPS_PER_CHECK = 32
"""Vector steps whose noise an evaluation draws at once."""
MOST_EPISODES = 2**20
"""Finished episodes that are listed at most."""
SOLVED_STATES = 1_024
"""States of a table up to which it is solved exactly."""


@dataclass(frozen=True)
class Sizes:
    """The settings that memory depends on, by field of `train.Args`."""

    num_seeds: int
    num_points: int
    num_envs: int
    buffer_size: int
    batch_size: int
    hidden_sizes: tuple[int, ...]
    eval_episodes: int
    total_timesteps: int
    log_interval: int
    chunk_steps: int
    train_freq: int
    gradient_steps: int
    eps_repeat: float

    @property
    def num_members(self) -> int:
        """M: each point of a sweep is trained with each seed."""
        return self.num_seeds * self.num_points

    @classmethod
    def of(cls, args: object) -> Sizes:
        """Those of `train.Args`, or of an object that has these attributes."""
        return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})


class Layout(NamedTuple):
    """One copy of an environment, in bytes and numbers.

    Attributes:
        obs_bytes: an observation as the replay stores it.
        state_bytes: what the copy carries from step to step, its observation included.
        num_features: F, float32 numbers that the network reads.
        num_actions: A.
        step_noise, reset_noise: uniform numbers of a step.
        max_steps: time limit of an episode.
        num_states: X, states that are solved exactly; 0: none.
        on_host: whether the copy lives outside torch.
        in_workers: whether each lives in a process of its own.
    """

    obs_bytes: int
    state_bytes: int
    num_features: int
    num_actions: int
    step_noise: int
    reset_noise: int
    max_steps: int
    num_states: int
    on_host: bool
    in_workers: bool

    @classmethod
    def of(cls, env: TensorEnv) -> Layout:
        """That of `env`, seen from one copy on the CPU; environments on the host make none."""
        obs = env.example_obs()
        if env.on_host:
            state_bytes = obs.nbytes + 8
        else:
            vector = env.vector_reset(torch.zeros(1, env.reset_noise_dim))
            state_bytes = sum(tensor.nbytes for tensor in vector.leaves())
        num_states = len(env.states()[0]) if isinstance(env, TabularEnv) else 0
        return cls(
            obs_bytes=obs.nbytes,
            state_bytes=state_bytes,
            num_features=env.features(obs).shape[-1],
            num_actions=env.num_actions,
            step_noise=env.step_noise_dim,
            reset_noise=env.reset_noise_dim,
            max_steps=env.max_steps,
            num_states=num_states if num_states <= SOLVED_STATES else 0,
            on_host=env.on_host,
            in_workers=env.background,
        )


@dataclass(frozen=True)
class Needs:
    """Bytes of a run's parts.

    Attributes:
        kept: what is there all the time, by part.
        passing: what is needed for a moment, by what is done then; never two of them at once.
    """

    kept: dict[str, int]
    passing: dict[str, int]

    @property
    def parts(self) -> dict[str, int]:
        """All parts, the largest first."""
        parts = {**self.kept, **self.passing}
        return dict(sorted(parts.items(), key=lambda part: -part[1]))

    @property
    def total(self) -> int:
        """Bytes at the worst moment."""
        return sum(self.kept.values()) + max(self.passing.values())


FLAGS: dict[str, tuple[str, ...]] = {
    "replay": ("buffer_size", "num_seeds"),
    "members": ("num_seeds", "hidden_sizes"),
    "environments": ("num_envs", "num_seeds"),
    "noise": ("num_envs", "batch_size", "num_seeds"),
    "metrics": ("num_seeds", "num_envs"),
    "files": ("num_seeds", "hidden_sizes"),
    "diagnostics": ("num_seeds",),
    "program": (),
    "gaps": (),
    "drawing noise": ("num_envs", "batch_size", "num_seeds"),
    "vector step": ("num_envs", "num_seeds", "hidden_sizes"),
    "gradient step": ("batch_size", "num_seeds", "hidden_sizes"),
    "evaluation": ("eval_episodes", "num_seeds", "hidden_sizes"),
    "exact values": ("num_seeds", "hidden_sizes"),
    "log point": ("num_seeds", "buffer_size"),
    "compiling": ("buffer_size", "num_seeds"),
}
"""By part, the settings that it grows with; the first one is the first to be called too large."""


@dataclass(frozen=True)
class _Run:
    """A run in numbers; one letter as in the rest of the project: M members, N env copies of each,
    B rows of a batch, K vector steps of a chunk, U gradient steps of a vector step."""

    sizes: Sizes
    layout: Layout
    on_cuda: bool

    @property
    def copies(self) -> int:
        """M * N."""
        return self.sizes.num_members * self.sizes.num_envs

    @property
    def num_parameters(self) -> int:
        """Of one network of all members."""
        widths = (self.layout.num_features, *self.sizes.hidden_sizes, self.layout.num_actions)
        one = sum((fan_in + 1) * fan_out for fan_in, fan_out in itertools.pairwise(widths))
        return self.sizes.num_members * one

    @property
    def outputs(self) -> int:
        """Numbers that the layers of a network make of one row."""
        return sum(self.sizes.hidden_sizes) + self.layout.num_actions

    @property
    def widest(self) -> int:
        return max(self.sizes.hidden_sizes, default=0)

    @property
    def forward(self) -> int:
        """Bytes of one row on its way through a network: features, what the layers make of them,
        and one hidden layer before its ReLU."""
        return 4 * (self.layout.num_features + self.outputs + self.widest)

    @property
    def updates(self) -> int:
        """U at most."""
        return self.sizes.gradient_steps * -(-self.sizes.num_envs // self.sizes.train_freq)

    @property
    def replay_rows(self) -> int:
        """Integers that one vector step draws to sample replay: M * U * B."""
        return self.sizes.num_members * self.updates * self.sizes.batch_size

    @property
    def numbers(self) -> int:
        """32-bit numbers that one vector step draws; an integer takes the room of two."""
        per_copy = 2 + self.layout.step_noise + self.layout.reset_noise
        return self.copies * per_copy + 2 * self.replay_rows

    @property
    def window(self) -> int:
        """Vector steps whose noise is drawn at once, see `train.make_plan`."""
        num_steps = -(-self.sizes.total_timesteps // self.sizes.num_envs)
        return min(max(1, NUMBERS_AT_ONCE // self.numbers), num_steps)

    @property
    def chunk(self) -> int:
        """K at most."""
        return 1 if self.layout.on_host else min(self.window, self.sizes.chunk_steps)

    @property
    def interval(self) -> int:
        """Transitions of a member between two log points, at most."""
        asked = self.sizes.log_interval or self.sizes.total_timesteps
        return min(asked, self.sizes.total_timesteps) + self.sizes.num_envs - 1

    @property
    def episodes(self) -> int:
        """Finished episodes that are listed between two log points, at most."""
        return min(self.interval * self.sizes.num_members, MOST_EPISODES)

    @property
    def record(self) -> int:
        """Bytes that a chunk leaves behind for the metrics."""
        updates = len(UPDATE_METRICS) * self.sizes.num_members * self.updates
        return 4 * self.chunk * (2 * self.copies + updates)

    @property
    def transition(self) -> int:
        """Bytes of a transition as the replay stores it: two observations, action, reward, flag."""
        action = 1 if self.layout.num_actions <= 2**8 else 2
        return 2 * self.layout.obs_bytes + action + 4 + 1

    @property
    def replay(self) -> int:
        return self.sizes.num_members * self.sizes.buffer_size * self.transition

    @property
    def environments(self) -> int:
        """Tensors of the env copies, the random actions that they hold included."""
        return self.copies * (self.layout.state_bytes + (8 if self.sizes.eps_repeat else 0))

    @property
    def state(self) -> int:
        """What is carried, and a checkpoint holds: with the online and the target network and two
        moments of Adam."""
        return self.replay + self.environments + 4 * 4 * self.num_parameters

    @property
    def dynamics(self) -> int:
        """Bytes of one copy in a step: the new state, what the step did, replay rows, and terms
        between; measured 60 for LineWorld, 85 for CartPole and 139 for Acrobot."""
        return 3 * (self.layout.state_bytes + self.layout.obs_bytes) // 2 + 40

    @property
    def files(self) -> int:
        """Copies on the host that are written beside the loop: a checkpoint and the one before it,
        unless they are large, and the best agent."""
        return 2 * min(self.state, COPIED_BYTES) + 4 * self.num_parameters

    @property
    def diagnostics(self) -> int:
        """Snapshots on the host, and all of them once more where they are written."""
        interval = self.sizes.log_interval or self.sizes.total_timesteps
        count = min(self.sizes.total_timesteps // interval, MOST_SNAPSHOTS) + 2
        tables = self.layout.num_states * (4 * self.layout.num_actions + 8)
        return 2 * count * self.sizes.num_members * (4 * SAMPLE_SIZE + 8 + tables)

    def needs(self, state_copies: int) -> Needs:
        kept, passing = self._kept(), self._passing() | {"compiling": state_copies * self.state}
        if self.on_cuda:  # recorded in CUDA graphs, whose memory is their own
            kept |= {name: passing.pop(name) for name in ("vector step", "gradient step")}
        else:
            kept |= {
                "files": self.files,
                "diagnostics": self.diagnostics,
                "gaps": min(max(passing.values()), GAPS),
            }
        return Needs(kept, passing)

    def _kept(self) -> dict[str, int]:
        on_host = 0
        if self.layout.on_host and not self.on_cuda:
            on_host = self.copies * (WORKER if self.layout.in_workers else HOST_COPY)
        num_updates = max(Metrics.KEPT_UPDATES, self.chunk * self.updates)
        update_metrics = 4 * len(UPDATE_METRICS) * self.sizes.num_members * num_updates
        return {
            "replay": self.replay,
            # The state's four, the best evaluation's and that of the last log point.
            "members": (4 + 2) * 4 * self.num_parameters,
            "environments": self.environments + on_host,
            # Compiled and captured functions read copies of a chunk.
            "noise": 4 * self.numbers * (self.window + self.chunk),
            "metrics": 8 * max(self.chunk * self.copies, self.episodes) + update_metrics,
            "program": PROGRAM["cuda" if self.on_cuda else "cpu"],
        }

    def _passing(self) -> dict[str, int]:
        sizes, layout = self.sizes, self.layout
        m, n, b, f, a = (
            sizes.num_members,
            sizes.num_envs,
            sizes.batch_size,
            layout.num_features,
            layout.num_actions,
        )
        # Of the stream with the most numbers, words of 64 bits and as many more on the way.
        most_drawn = max(
            self.copies * max(2, layout.step_noise, layout.reset_noise), 2 * self.replay_rows
        )

        rows = n if self.on_cuda else max(min(n, ACT_BLOCK), -(-n // MOST_BLOCKS))
        acting = m * rows * self.forward + self.copies * (8 * a + 24)
        # Both observations, stored and as features; then the backward pass keeps what every layer
        # made, and makes two of the widest. Adam: gradients, denominators, steps.
        batch = self.transition + 32 + 2 * 4 * f + f
        backward = 4 * (self.outputs + 2 * self.widest + 5 * a) + 32

        # An evaluation plays all episodes at once; it draws a window of noise beside the last one.
        episodes = m * sizes.eval_episodes
        check = min(STEPS_PER_CHECK, layout.max_steps)
        drawn = 4 * check * (layout.step_noise + layout.reset_noise)
        drawing = 2 * drawn + 20 * check * max(layout.step_noise, layout.reset_noise)
        playing = drawn + max(f + self.forward, self.dynamics)
        episode = 2 * layout.state_bytes + 4 * a + 16 + max(drawing, playing)

        diagnosed = m * SAMPLE_SIZE * (2 * self.forward + 4 * f + 2 * layout.obs_bytes + 64)
        newest = min(sizes.buffer_size, self.interval) if layout.num_states else 0
        visited = m * newest * (24 + 2 * layout.obs_bytes)
        return {
            # The next window is drawn while the last is there.
            "drawing noise": self.window * (4 * self.numbers + 20 * most_drawn),
            "vector step": self.record + max(acting, self.copies * self.dynamics),
            "gradient step": m * b * (batch + backward) + 3 * 4 * self.num_parameters,
            "evaluation": episodes * (episode + (HOST_COPY if layout.on_host else 0)),
            "exact values": m * layout.num_states * (4 * f + self.forward + 12 * a),
            "log point": max(diagnosed, visited, 64 * self.episodes),
        }


def memory_needs(
    args: object, env: TensorEnv, device: torch.device, state_copies: int = 0
) -> Needs:
    """Bytes that a run takes on its device, by part.

    Args:
        args: settings, `train.Args`.
        env: the environment.
        device: of the run. What a run on CUDA holds on the host beside is not counted.
        state_copies: copies of everything carried that the engine makes for a moment; the compiler
            makes some.
    """
    run = _Run(Sizes.of(args), Layout.of(env), device.type == "cuda")
    return run.needs(state_copies)


# --------------------------------------------------------------------------------- what is free


def free_memory(device: torch.device) -> int | None:
    """Bytes that a run may still take on `device`; None: not known.

    On CUDA what the card has free and what torch's allocator holds unused; elsewhere the memory of
    the host, which MPS shares.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return free_on_host() if device.type in ("cpu", "mps") else None


def free_on_host(root: Path = ROOT) -> int | None:
    """Bytes of the host's memory that processes can still take, within the limits of this one's
    control groups; None: not known.

    Args:
        root: where `proc` and `sys` are.
    """
    available = _available(root / "proc" / "meminfo")
    limits = [available] if available is not None else []
    return min([*limits, *_free_in_groups(root)], default=None)


def _available(meminfo: Path) -> int | None:
    """Linux: MemAvailable. Elsewhere free pages where they are counted, else all pages: what is
    larger than all of the memory does not fit into a part of it."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        try:
            pages = os.sysconf(name)
        except (AttributeError, ValueError, OSError):  # another system
            continue
        if pages > 0:
            return pages * os.sysconf("SC_PAGE_SIZE")
    return None


class _GroupFiles(NamedTuple):
    """Names of a memory control group's files, and of the line of its statistics that counts file
    pages that can be given up."""

    limit: str
    usage: str
    inactive: str


_V2 = _GroupFiles("memory.max", "memory.current", "inactive_file")
_V1 = _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _free_in_groups(root: Path) -> Iterator[int]:
    """What this process's memory control groups, and the groups around them, leave free."""
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = root / "sys" / "fs" / "cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        folders, files = [mounts, mounts / "unified"], _V2
        if controllers:
            folders, files = [mounts / "memory"], _V1
            if "memory" not in controllers.split(","):
                continue
        # In a container the path may be the host's, of which only the last group is to be seen, as
        # the root: folders that are not there are passed over.
        for folder in folders:
            group = folder / path.lstrip("/")
            for place in (group, *group.parents):
                if place.is_relative_to(folder):
                    yield from _free_in_group(place, files)


def _free_in_group(group: Path, files: _GroupFiles) -> Iterator[int]:
    """What one group leaves free; nothing where it has no limit or is not to be seen."""
    try:
        limit = (group / files.limit).read_text().strip()
        usage = int((group / files.usage).read_text())
        statistics = (group / "memory.stat").read_text().split()
    except OSError:
        return
    if limit.isdigit() and int(limit) < 2**60:  # else "max", or the largest number of pages
        values = dict(zip(statistics[::2], statistics[1::2], strict=False))
        yield max(int(limit) - usage + int(values.get(files.inactive, 0)), 0)


# ------------------------------------------------------------------------------------- the check


def fits(args: object, env: TensorEnv, device: torch.device, state_copies: int = 0) -> bool:
    """Whether a run fits into what is free on its device, as far as that is known; arguments as
    `memory_needs`."""
    free = free_memory(device)
    return free is None or memory_needs(args, env, device, state_copies).total <= free


def check_memory(args: object, env: TensorEnv, device: torch.device, state_copies: int = 0) -> None:
    """Refuse a run that does not fit into what is free on its device.

    Arguments as `memory_needs`; cost: below 1 ms.

    Raises:
        ValueError: it does not fit. The message names the flag of the largest part that can be made
            small enough, and the largest value that fits while all others stay.
    """
    free = free_memory(device)
    if free is None:
        return
    sizes, layout = Sizes.of(args), Layout.of(env)

    def needs(sizes: Sizes) -> Needs:
        return _Run(sizes, layout, device.type == "cuda").needs(state_copies)

    def fits(sizes: Sizes) -> bool:
        return needs(sizes).total <= free

    asked = needs(sizes)
    if asked.total <= free:
        return
    place = f"the {_in_words(free)} free on {device} ({_in_words(asked.total)} asked for)"
    flags = list(dict.fromkeys(flag for part in asked.parts for flag in FLAGS[part]))
    for flag in flags:
        if (most := _largest(sizes, flag, fits)) is not None:
            each = " each" if flag == "hidden_sizes" else ""
            raise ValueError(
                f"{_shown(sizes, flag)}: must be at most {most:,}{each}, what fits into {place}"
            )
    if fits(_with_least(sizes, flags)):
        for flag in list(flags):  # leave out what need not be smaller
            others = [other for other in flags if other != flag]
            flags = others if fits(_with_least(sizes, others)) else flags
        shown = " ".join(_shown(sizes, flag) for flag in flags)
        raise ValueError(f"{shown}: must be smaller, all of them, to fit into {place}")
    raise ValueError(f"--device {device}: must have more memory, no run fits into {place}")


def _largest(sizes: Sizes, flag: str, fits: Callable[[Sizes], bool]) -> int | None:
    """The largest value of a setting that fits, in three digits; None: not even the least does."""
    low, high = _least(sizes, flag), _value(sizes, flag)
    if low >= high or not fits(_with_value(sizes, flag, low)):
        return None
    least = low
    while high - low > 1:
        middle = (low + high) // 2
        if fits(_with_value(sizes, flag, middle)):
            low = middle
        else:
            high = middle
    # Less than three digits' worth of what is free may be taken by the time it is tried.
    unit = 10 ** max(len(str(low)) - 3, 0)
    rounded = low // unit * unit
    return rounded if rounded >= least and fits(_with_value(sizes, flag, rounded)) else low


def _least(sizes: Sizes, flag: str) -> int:
    """The smallest value that a setting may have beside the others, see `train.check`."""
    if flag == "buffer_size":
        return max(sizes.num_envs, sizes.batch_size)
    if flag == "num_envs" and sizes.total_timesteps < sizes.batch_size:
        return sizes.batch_size
    return 1


def _value(sizes: Sizes, flag: str) -> int:
    """A setting's value; of the hidden layers that of the widest."""
    return max(sizes.hidden_sizes, default=0) if flag == "hidden_sizes" else getattr(sizes, flag)


def _with_value(sizes: Sizes, flag: str, value: int) -> Sizes:
    """The settings with another value; no hidden layer wider than it."""
    if flag == "hidden_sizes":
        hidden = tuple(min(size, value) for size in sizes.hidden_sizes)
        return dataclasses.replace(sizes, hidden_sizes=hidden)
    changed: dict[str, Any] = {flag: value}
    return dataclasses.replace(sizes, **changed)


def _with_least(sizes: Sizes, flags: Sequence[str]) -> Sizes:
    """The settings with the least values of some."""
    for flag in [*flags, *flags]:  # the least of one may depend on another
        least = min(_least(sizes, flag), _value(sizes, flag))
        sizes = _with_value(sizes, flag, least)
    return sizes


def _shown(sizes: Sizes, name: str) -> str:
    """A setting as on the command line, with its value."""
    return f"--{name.replace('_', '-')} {getattr(sizes, name)}"


def _in_words(size: int) -> str:
    """Bytes in MB or GB, rounded up; of whole numbers, which may be too large for a float."""
    unit, name = (10**9, "GB") if size >= 10**9 else (10**6, "MB")
    tenths = -(-size * 10 // unit)
    return f"{tenths // 10:,}.{tenths % 10} {name}"
