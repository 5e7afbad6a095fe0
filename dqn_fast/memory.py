"""Memory of a run, computed from its settings before the first tensor is made.

    check_memory(args, env, device)  # ValueError: one line with the flag and the value that fits
    check_evaluation(env, 1, 10**6, (128, 128), device)  # the same for an evaluation alone

The shape of every tensor follows from the settings, so its size is integer arithmetic, without
overflow. Nothing is allocated in proportion to a setting: one copy of the environment shows shapes
and dtypes. All other memory is a constant of the device: libraries that are loaded later,
workspaces of matrix products, gaps between allocations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dqn_fast import tree
from dqn_fast.algorithm import UPDATE_METRICS
from dqn_fast.envs import TabularEnv, TensorEnv
from dqn_fast.record.diagnostics import MOST_SNAPSHOTS, SAMPLE_SIZE
from dqn_fast.record.metrics import Metrics
from dqn_fast.settings import one_line

EVAL_EPISODES = 100
"""Episodes of an evaluation, unless they are set."""

RESULT = 2 * 16
"""Bytes of the results of an episode, and of a second copy while those of all rounds are joined."""

PROGRAM = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
"""Bytes of a run that are not tensors, by type of device. CPU: measured 28 MB, and 66 MB with the
report. CUDA: an estimate for cuBLAS and for kernels, which are loaded at their first call."""

HOST_COPY, WORKER = 4 * 2**10, 4 * 2**20
"""Lower bounds of the bytes of one Gymnasium environment, in this process and in a process of its
own. Measured: 4 to 27 KB for five environments of Gymnasium, and 4.8 MB."""

RECORD, GRADIENT_STEP = 4 * 2**10, 3 * 2**10
"""Bytes of Python's objects, for each member: its settings, its rows of a log point and of the
summary; and for each gradient step of a chunk: views of its random numbers and of its schedules.
Measured: 3.3 KB in a chunk of 30,000 gradient steps."""

WORKER_FILES, OTHER_FILES = 3, 128
"""Open files of an environment in a process of its own, and of all else; measured: 3 and 20."""

MOST_STEPS = 10_000_000
"""Largest time limit. An evaluation plays whole episodes: so many steps take ten minutes, and
above 2**31 they could not be counted."""
MOST_COUNTED = 2**62
"""Largest product of counts, which are int64."""

ROOT = Path("/")

GAPS = 256 * 2**20
"""Maximum freed memory that a CPU's allocator keeps. glibc puts blocks below 32 MiB into a heap, in
which later blocks leave gaps: measured up to 300 MB, and 0 with larger blocks."""

# Copies of constants of modules that this one may not import, or that are private there; a test
# compares them.
COPIED_BYTES = 2**28
"""Maximum bytes of a checkpoint that is copied and written while the loop runs: `record.run`."""
ACT_BLOCK, MOST_BLOCKS = 1_024, 16
"""Env copies whose Q-values a CPU computes at a time, and number of such blocks: `dqn`."""
NUMBERS_AT_ONCE = 2**19
"""Random numbers drawn at once, see `setup.make_plan`; a single vector step may need more."""
STEPS_PER_CHECK = 32
"""Vector steps whose noise an evaluation draws at once: `evaluate`."""
MOST_EPISODES = 2**20
"""Maximum number of finished episodes that are listed: `train.most_episodes`, `EpisodeLog`."""
SOLVED_STATES = 1_024
"""Maximum number of states of a table that is solved exactly: `exact.solve`."""


@dataclass(frozen=True)
class Sizes:
    """The settings on which memory depends; names as in `train.Args`."""

    num_seeds: int
    num_points: int
    num_envs: int
    buffer_size: int
    batch_size: int
    hidden_sizes: tuple[int, ...]
    eval_episodes: int | None
    eval_envs: int | None
    total_timesteps: int
    log_interval: int
    chunk_steps: int
    train_freq: int
    gradient_steps: int
    holds_actions: bool

    @property
    def num_members(self) -> int:
        """M: each point of a sweep is trained with each seed."""
        return self.num_seeds * self.num_points

    @classmethod
    def of(cls, args: object) -> Sizes:
        """From `train.Args`, or from another object with these attributes."""
        return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})


class Layout(NamedTuple):
    """Sizes of one copy of an environment.

    Attributes:
        obs_bytes: bytes of an observation as the replay stores it.
        state_bytes: bytes of the copy's state between steps, its observation included.
        num_features: F, float32 numbers that the network reads.
        num_actions: A.
        step_noise, reset_noise: uniform numbers per step.
        max_steps: time limit of an episode.
        num_states: X, states that are solved exactly; 0: none.
        on_host: whether the copy runs outside torch.
        in_workers: whether each copy runs in its own process.
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
        """Sizes of `env`, from one copy on the CPU; for an environment on the host without one."""
        obs = env.example_obs()
        if env.on_host:
            state_bytes = obs.nbytes + 8
        else:
            vector = env.vector_reset(torch.zeros(1, env.reset_noise_dim))
            state_bytes = tree.num_bytes(vector)
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
        kept: parts that are allocated during the whole run.
        passing: parts that are allocated for one activity; no two at the same time.
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
    "replay": ("buffer_size", "num_seeds", "num_points"),
    "members": ("num_seeds", "num_points", "hidden_sizes"),
    "environments": ("num_envs", "num_seeds", "num_points"),
    "noise": ("num_envs", "batch_size", "gradient_steps", "num_seeds", "num_points"),
    "metrics": ("num_seeds", "num_points", "num_envs", "gradient_steps"),
    "files": ("num_seeds", "num_points", "hidden_sizes"),
    "diagnostics": ("num_seeds", "num_points"),
    "program": (),
    "gaps": (),
    "records": ("num_seeds", "num_points"),
    "drawing noise": ("num_envs", "batch_size", "gradient_steps", "num_seeds", "num_points"),
    "schedules": ("gradient_steps", "num_seeds", "num_points"),
    "vector step": ("num_envs", "gradient_steps", "num_seeds", "num_points", "hidden_sizes"),
    "gradient step": ("batch_size", "num_seeds", "num_points", "hidden_sizes"),
    "evaluation": ("eval_episodes", "num_seeds", "num_points", "hidden_sizes"),
    "exact values": ("num_seeds", "num_points", "hidden_sizes"),
    "log point": ("num_seeds", "num_points", "buffer_size"),
    "compiling": ("buffer_size", "num_seeds", "num_points"),
}
"""The settings with which each part grows; the first is the first that an error message names."""


@dataclass(frozen=True)
class _Run:
    """Sizes of a run: M members, N env copies of each, B rows of a batch, K vector steps of a
    chunk, U gradient steps of a vector step."""

    sizes: Sizes
    layout: Layout
    on_cuda: bool

    @property
    def copies(self) -> int:
        """M * N."""
        return self.sizes.num_members * self.sizes.num_envs

    @property
    def num_parameters(self) -> int:
        """Parameters of one network, over all members."""
        widths = (self.layout.num_features, *self.sizes.hidden_sizes, self.layout.num_actions)
        one = sum((fan_in + 1) * fan_out for fan_in, fan_out in itertools.pairwise(widths))
        return self.sizes.num_members * one

    @property
    def outputs(self) -> int:
        """Outputs of all layers of a network for one row."""
        return sum(self.sizes.hidden_sizes) + self.layout.num_actions

    @property
    def widest(self) -> int:
        return max(self.sizes.hidden_sizes, default=0)

    @property
    def forward(self) -> int:
        """Bytes of one row in a forward pass: features, outputs of all layers, and one hidden layer
        before its ReLU."""
        return 4 * (self.layout.num_features + self.outputs + self.widest)

    @property
    def updates(self) -> int:
        """Maximum U."""
        return self.sizes.gradient_steps * -(-self.sizes.num_envs // self.sizes.train_freq)

    @property
    def replay_rows(self) -> int:
        """Integers that one vector step draws to sample replay: M * U * B."""
        return self.sizes.num_members * self.updates * self.sizes.batch_size

    @property
    def numbers(self) -> int:
        """32-bit numbers that one vector step draws; an integer counts as two."""
        per_copy = 2 + self.layout.step_noise + self.layout.reset_noise
        return self.copies * per_copy + 2 * self.replay_rows

    @property
    def window(self) -> int:
        """Vector steps whose noise is drawn at once, see `setup.make_plan`."""
        num_steps = -(-self.sizes.total_timesteps // self.sizes.num_envs)
        return min(max(1, NUMBERS_AT_ONCE // self.numbers), num_steps)

    @property
    def chunk(self) -> int:
        """Maximum K."""
        return 1 if self.layout.on_host else min(self.window, self.sizes.chunk_steps)

    @property
    def interval(self) -> int:
        """Maximum number of transitions of a member between two log points."""
        asked = self.sizes.log_interval or self.sizes.total_timesteps
        return min(asked, self.sizes.total_timesteps) + self.sizes.num_envs - 1

    @property
    def episodes(self) -> int:
        """Maximum number of finished episodes that are listed between two log points."""
        return min(self.interval * self.sizes.num_members, MOST_EPISODES)

    @property
    def record(self) -> int:
        """Bytes of a chunk's `ChunkRecord`."""
        updates = len(UPDATE_METRICS) * self.sizes.num_members * self.updates
        return 4 * self.chunk * (2 * self.copies + updates)

    @property
    def transition(self) -> int:
        """Bytes of a stored transition: two observations, action, reward, flag."""
        action = 1 if self.layout.num_actions <= 2**8 else 2
        return 2 * self.layout.obs_bytes + action + 4 + 1

    @property
    def replay(self) -> int:
        return self.sizes.num_members * self.sizes.buffer_size * self.transition

    @property
    def environments(self) -> int:
        """Bytes of the env copies' tensors, held random actions included."""
        return self.copies * (self.layout.state_bytes + (8 if self.sizes.holds_actions else 0))

    @property
    def state(self) -> int:
        """Bytes of `dqn.State`, which a checkpoint contains: replay, environments, and four sets of
        parameters: online network, target network, two moments of Adam."""
        return self.replay + self.environments + 4 * 4 * self.num_parameters

    @property
    def dynamics(self) -> int:
        """Bytes of one copy in a step: new state, outcome, replay rows, intermediate results.
        Measured: 60 for LineWorld, 85 for CartPole and 139 for Acrobot."""
        return 3 * (self.layout.state_bytes + self.layout.obs_bytes) // 2 + 40

    @property
    def files(self) -> int:
        """Bytes of the host copies that are written while the loop runs: two consecutive
        checkpoints, unless they are large, and the best agent."""
        return 2 * min(self.state, COPIED_BYTES) + 4 * self.num_parameters

    @property
    def diagnostics(self) -> int:
        """Bytes of the snapshots on the host, and of a second copy while they are written."""
        interval = self.sizes.log_interval or self.sizes.total_timesteps
        count = min(self.sizes.total_timesteps // interval, MOST_SNAPSHOTS) + 2
        tables = self.layout.num_states * (4 * self.layout.num_actions + 8)
        return 2 * count * self.sizes.num_members * (4 * SAMPLE_SIZE + 8 + tables)

    def needs(self, state_copies: int) -> Needs:
        kept, passing = self._kept(), self._passing() | {"compiling": state_copies * self.state}
        if self.on_cuda:  # captured in CUDA graphs, which keep their memory
            kept |= {name: passing.pop(name) for name in ("vector step", "gradient step")}
        else:
            kept |= {
                "files": self.files,
                "diagnostics": self.diagnostics,
                "records": RECORD * self.sizes.num_members,
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
            # Four sets of the state, the best evaluation's and the last log point's.
            "members": (4 + 2) * 4 * self.num_parameters,
            "environments": self.environments + on_host,
            # Compiled and captured functions read a copy of each chunk.
            "noise": 4 * self.numbers * (self.window + self.chunk),
            "metrics": 8 * max(self.chunk * self.copies, self.episodes) + update_metrics,
            "program": PROGRAM["cuda" if self.on_cuda else "cpu"],
        }

    @property
    def evaluation(self) -> int:
        """Bytes of an evaluation, which draws noise before it frees the last."""
        layout, f = self.layout, self.layout.num_features
        check = min(STEPS_PER_CHECK, layout.max_steps)
        drawn = 4 * check * (layout.step_noise + layout.reset_noise)
        drawing = 2 * drawn + 20 * check * max(layout.step_noise, layout.reset_noise)
        playing = drawn + max(f + self.forward, self.dynamics)
        episode = 2 * layout.state_bytes + 4 * layout.num_actions + 16 + max(drawing, playing)
        sizes = self.sizes
        episodes = EVAL_EPISODES if sizes.eval_episodes is None else sizes.eval_episodes
        if not episodes:
            return 0
        copies = copies_of(layout.on_host, episodes, sizes.num_envs, sizes.eval_envs)
        each = episode + (HOST_COPY if layout.on_host else 0)
        return sizes.num_members * (copies * each + RESULT * episodes)

    def _passing(self) -> dict[str, int]:
        sizes, layout = self.sizes, self.layout
        m, n, b, f, a = (
            sizes.num_members,
            sizes.num_envs,
            sizes.batch_size,
            layout.num_features,
            layout.num_actions,
        )
        # The stream with the most numbers: 64-bit words, and as many intermediate results.
        most_drawn = max(
            self.copies * max(2, layout.step_noise, layout.reset_noise), 2 * self.replay_rows
        )

        rows = n if self.on_cuda else max(min(n, ACT_BLOCK), -(-n // MOST_BLOCKS))
        acting = m * rows * self.forward + self.copies * (8 * a + 24)
        # Both observations, stored and as features. The backward pass keeps the output of every
        # layer and allocates the widest twice. Adam: gradients, denominators, steps.
        batch = self.transition + 32 + 2 * 4 * f + f
        backward = 4 * (self.outputs + 2 * self.widest + 5 * a) + 32

        # On the host, for each gradient step: 8 numbers of the plan, and 5 float64 and 4 float32
        # of each member.
        scheduled = self.window * self.updates * (8 * 8 + m * (5 * 8 + 4 * 4))
        views = 0 if self.on_cuda else GRADIENT_STEP * self.chunk * self.updates

        diagnosed = m * SAMPLE_SIZE * (2 * self.forward + 4 * f + 2 * layout.obs_bytes + 64)
        newest = min(sizes.buffer_size, self.interval) if layout.num_states else 0
        visited = m * newest * (24 + 2 * layout.obs_bytes)
        return {
            # The next window is drawn before the last is freed.
            "drawing noise": self.window * (4 * self.numbers + 20 * most_drawn),
            "schedules": scheduled,
            "vector step": self.record + views + max(acting, self.copies * self.dynamics),
            "gradient step": m * b * (batch + backward) + 3 * 4 * self.num_parameters,
            "evaluation": self.evaluation,
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
        device: of the run. For a run on CUDA the memory of the host is not counted.
        state_copies: temporary copies of the state that the engine makes while it compiles.
    """
    run = _Run(Sizes.of(args), Layout.of(env), device.type == "cuda")
    return run.needs(state_copies)


# ---------------------------------------------------------------------------------- free memory


def free_memory(device: torch.device) -> int | None:
    """Free bytes on `device`; None: not known.

    On CUDA the free memory of the card and the unused memory of torch's allocator; elsewhere the
    memory of the host, which MPS shares.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return free_on_host() if device.type in ("cpu", "mps") else None


def free_on_host(root: Path = ROOT) -> int | None:
    """Free bytes of the host, within the limits of this process and of its control groups; None:
    not known.

    Args:
        root: folder of `proc` and `sys`.
    """
    available = _available(root / "proc" / "meminfo")
    limits = [available] if available is not None else []
    return min([*limits, *_free_in_process(root), *_free_in_groups(root)], default=None)


def _free_in_process(root: Path) -> Iterator[int]:
    """What `ulimit -v` leaves of this process's address space; nothing without a limit."""
    if sys.platform == "win32":
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = int((root / "proc" / "self" / "statm").read_text().split()[0])
            yield max(limit - pages * os.sysconf("SC_PAGE_SIZE"), 0)


def _available(meminfo: Path) -> int | None:
    """Linux: MemAvailable. Other systems: free pages if they are counted, else all pages, which is
    an upper bound."""
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
    """Names of a memory control group's files, and of the line of its statistics that counts
    reclaimable file pages."""

    limit: str
    usage: str
    inactive: str


_V2 = _GroupFiles("memory.max", "memory.current", "inactive_file")
_V1 = _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _free_in_groups(root: Path) -> Iterator[int]:
    """Free bytes of this process's memory control groups and of all their parents."""
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
        # In a container the path may be the host's, while only the last group is visible, as the
        # root. Folders that do not exist are skipped.
        for folder in folders:
            group = folder / path.lstrip("/")
            for place in (group, *group.parents):
                if place.is_relative_to(folder):
                    yield from _free_in_group(place, files)


def _free_in_group(group: Path, files: _GroupFiles) -> Iterator[int]:
    """Free bytes of one group; nothing if it has no limit or is not visible."""
    try:
        limit = (group / files.limit).read_text().strip()
        usage = int((group / files.usage).read_text())
        statistics = (group / "memory.stat").read_text().split()
    except OSError:
        return
    if limit.isdigit() and int(limit) < 2**60:  # otherwise "max", or the largest number of pages
        values = dict(zip(statistics[::2], statistics[1::2], strict=False))
        yield max(int(limit) - usage + int(values.get(files.inactive, 0)), 0)


# ------------------------------------------------------------------------------------- the check


def fits(args: object, env: TensorEnv, device: torch.device, state_copies: int = 0) -> bool:
    """Whether a run fits into the free memory of its device; true if that is not known. Arguments
    as `memory_needs`."""
    free = free_memory(device)
    return free is None or memory_needs(args, env, device, state_copies).total <= free


def check_memory(args: object, env: TensorEnv, device: torch.device, state_copies: int = 0) -> None:
    """Refuse a run that does not fit into the free memory of its device, or into its counters.

    Arguments as `memory_needs`; cost: below 1 ms.

    Raises:
        ValueError: it does not fit. The message names the flag of the largest part that can be made
            small enough, and the largest value that fits if all other settings stay.
    """
    params: Mapping[str, Any] = getattr(args, "env_params", {})
    sizes = Sizes.of(args)
    check_time_limit(env, params)
    check_workers(env, sizes)
    free = free_memory(device)
    if free is None:
        return check_counts(sizes)
    layout = Layout.of(env)

    def needs(sizes: Sizes) -> Needs:
        return _Run(sizes, layout, device.type == "cuda").needs(state_copies)

    def fits(sizes: Sizes) -> bool:
        return needs(sizes).total <= free

    asked = needs(sizes)
    if asked.total <= free:
        return check_counts(sizes)
    place = _place(free, device, "run", asked.total)
    flags = list(dict.fromkeys(flag for part in asked.parts for flag in FLAGS[part]))
    if sizes.eval_envs:
        flags = ["eval_envs" if flag == "eval_episodes" else flag for flag in flags]
    for flag in flags:
        if (most := _largest(sizes, flag, fits)) is not None:
            each = " each" if flag == "hidden_sizes" else ""
            raise ValueError(
                f"{_shown(sizes, flag)}: must be at most {most:,}{each} to fit into {place}"
            )
    if fits(_with_least(sizes, flags)):
        for flag in list(flags):  # leave out settings that need not be smaller
            others = [other for other in flags if other != flag]
            flags = others if fits(_with_least(sizes, others)) else flags
        shown = " ".join(_shown(sizes, flag) for flag in flags)
        raise ValueError(f"{shown}: must all be smaller to fit into {place}")
    if params:
        pairs = " ".join(f"{name} {one_line(value)}" for name, value in params.items())
        raise ValueError(
            f"--env-params {pairs}: must make a smaller environment to fit into {place}"
        )
    raise ValueError(f"--device {device}: must have more memory; no run fits into {place}")


def copies_of(on_host: bool, num_episodes: int, num_envs: int, asked: int | None) -> int:
    """Env copies of each member that play an evaluation.

    Args:
        on_host: whether the environment is on the host, where a copy may hold much memory, a
            process or a licence.
        num_episodes: of the evaluation, >= 1.
        num_envs: most copies on the host, unless they are asked for.
        asked: value of --eval-envs.
    """
    usual = num_envs if on_host else num_episodes
    return min(asked or usual, num_episodes)


def check_time_limit(env: TensorEnv, params: Mapping[str, Any]) -> None:
    """Refuse a time limit that the steps of an episode cannot be counted up to.

    Args:
        env: the environment.
        params: the parameters that the user gave.

    Raises:
        ValueError: `max_steps` is above MOST_STEPS.
    """
    if env.max_steps > MOST_STEPS:
        name = next((n for n in ("max_steps", "max_episode_steps") if n in params), None)
        name = f"--env-params {name}" if name else f"{type(env).__name__}.max_steps"
        raise ValueError(
            f"{name} {one_line(env.max_steps)}: must be at most {MOST_STEPS:,}, the steps of the "
            "longest episode that an evaluation plays"
        )


def check_workers(env: TensorEnv, sizes: Sizes) -> None:
    """Refuse more copies in processes of their own than this process may have pipes to.

    Raises:
        ValueError: they need more open files than `ulimit -n` allows.
    """
    if not env.background or sys.platform == "win32":
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = (limit - OTHER_FILES) // (WORKER_FILES * sizes.num_members)
    if limit != resource.RLIM_INFINITY and sizes.num_envs > most:
        raise ValueError(
            f"--num-envs {sizes.num_envs}: must be at most {most:,} with --vectorization-mode "
            f"async, where this process may open {limit:,} files (ulimit -n)"
        )


def check_counts(sizes: Sizes) -> None:
    """Refuse settings whose products do not fit into 64 bits.

    Raises:
        ValueError: a run would take more than MOST_COUNTED gradient steps.
    """
    groups = -(-sizes.num_envs // sizes.train_freq)
    most = MOST_COUNTED // ((sizes.total_timesteps + sizes.num_envs) * groups)
    if sizes.gradient_steps > most:
        raise ValueError(
            f"--gradient-steps {sizes.gradient_steps}: must be at most {most:,} with "
            f"--total-timesteps {sizes.total_timesteps}, or there are too many to count"
        )


def check_evaluation(
    env: TensorEnv,
    num_members: int,
    episodes: int,
    hidden_sizes: tuple[int, ...],
    device: torch.device,
    name: str = "--episodes",
) -> None:
    """Refuse an evaluation that does not fit into the free memory of its device.

    Args:
        env: the environment.
        num_members: M, agents that play.
        episodes: of each agent, all played at once.
        hidden_sizes: widths of the network's hidden layers.
        device: where it runs.
        name: the flag of `episodes`.

    Raises:
        ValueError: it does not fit; the message has the largest number of episodes that does.
    """
    free = free_memory(device)
    if free is None:
        return
    layout = Layout.of(env)

    def needs(episodes: int) -> int:
        counts = dict.fromkeys((f.name for f in dataclasses.fields(Sizes)), 1)
        sizes = Sizes(
            **(counts | {"num_seeds": num_members, "eval_episodes": episodes}),  # type: ignore[arg-type]
        )
        sizes = dataclasses.replace(
            sizes, hidden_sizes=hidden_sizes, holds_actions=False, eval_envs=episodes
        )
        return _Run(sizes, layout, device.type == "cuda").evaluation

    if (asked := needs(episodes)) > free:
        most = free // needs(1)
        raise ValueError(
            f"{name} {one_line(episodes)}: must be at most {most:,} to fit into "
            f"{_place(free, device, 'evaluation', asked)}"
        )


def _place(free: int, device: torch.device, what: str, needs: int) -> str:
    return f"the {_in_words(free)} free on {device}; this {what} needs {_in_words(needs)}"


def _largest(sizes: Sizes, flag: str, fits: Callable[[Sizes], bool]) -> int | None:
    """The largest value of a setting that fits, rounded to three digits; None: no value fits."""
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
    # Rounded down, because a little memory may be taken before the user tries the value.
    unit = 10 ** max(len(str(low)) - 3, 0)
    rounded = low // unit * unit
    return rounded if rounded >= least and fits(_with_value(sizes, flag, rounded)) else low


def _least(sizes: Sizes, flag: str) -> int:
    """The smallest value that a setting may have with the others as they are, see `setup.check`."""
    if flag == "buffer_size":
        return max(sizes.num_envs, sizes.batch_size)
    if flag == "num_envs" and sizes.total_timesteps < sizes.batch_size:
        return sizes.batch_size
    return 1


def _value(sizes: Sizes, flag: str) -> int:
    """A setting's value; for `hidden_sizes` the width of the widest layer."""
    return max(sizes.hidden_sizes, default=0) if flag == "hidden_sizes" else getattr(sizes, flag)


def _with_value(sizes: Sizes, flag: str, value: int) -> Sizes:
    """The settings with one value changed; for `hidden_sizes` no layer is wider than it."""
    if flag == "hidden_sizes":
        hidden = tuple(min(size, value) for size in sizes.hidden_sizes)
        return dataclasses.replace(sizes, hidden_sizes=hidden)
    changed: dict[str, Any] = {flag: value}
    return dataclasses.replace(sizes, **changed)


def _with_least(sizes: Sizes, flags: Sequence[str]) -> Sizes:
    """The settings with some at their smallest values."""
    for flag in [*flags, *flags]:  # the smallest value of one may depend on another
        least = min(_least(sizes, flag), _value(sizes, flag))
        sizes = _with_value(sizes, flag, least)
    return sizes


def _shown(sizes: Sizes, name: str) -> str:
    """A setting and its value, as on the command line."""
    if name == "num_points":
        return f"--sweep with {sizes.num_points} settings"
    return f"--{name.replace('_', '-')} {one_line(getattr(sizes, name))}"


def _in_words(size: int) -> str:
    """Bytes in MB or GB, rounded up; integer arithmetic, as sizes may be too large for a float."""
    unit, name = (10**9, "GB") if size >= 10**9 else (10**6, "MB")
    tenths = -(-size * 10 // unit)
    return f"{tenths // 10:,}.{tenths % 10} {name}"
