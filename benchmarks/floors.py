"""The least that a part of a vector step could cost on this device.

The rates are measured on the same device in the same rounds as the parts:

    arithmetic  FLOPs of its matrix products / the rate of the fastest product measured
    bytes       what it must read and write / the copy rate at its working set
    launches    operations that compute something / the rate of tiny operations one after another

Within an operation arithmetic and memory overlap, so of these two the larger counts. On a CPU one
thread launches and computes in turn: floor = launches + max(arithmetic, bytes). On a GPU the host
launches ahead while kernels run: floor = the largest of the three. Views are not counted: they
compute nothing. Python, allocation and autograd are in no floor: they are the gap.

FLOPs, with 2 m k n for a product [m, k] x [k, n], over the layers [in, out] of each of M members:

    act     forward, 2 N in out
    update  forward twice (with double_q three times), 2 B in out each, and backward: the weights'
            gradients 2 in B out, the inputs' 2 B out in, for the first layer none

Bytes, each thing once: S of a copy's state (environment, observation, elapsed, return), O of an
observation, T of a stored transition, D noise numbers of a copy, F features, P parameters.
LineWorld of 15 states has S 13, O 1, T 8, D 1, F 15:

    act            M N (O + 8 noise + 8 action) + 4 M P
    env step       M N (2 S + 8 action + 4 D + O + 14 reward, flags, return, length)
    replay add     M N (2 O + 13 action, reward, flag + T)
    replay sample  M B (8 row + T + 8 F + 13), features of both observations included
    update         M B (8 F + 13) + 40 M P: parameters, target and both moments read and written,
                   gradients written and read again, as their norm comes between
    vector step    M N (2 S + 4 (D + 2) + T + 8 return, length) + 4 M P
                   + for each gradient step M B (8 + T) + 40 M P
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import synchronise
from dqn_fast import tree
from dqn_fast.dqn import DQN, State

Shape = tuple[int, int, int]
Job = Callable[[], object]

COPY_SIZES = tuple(2**power for power in (16, 18, 20, 22, 24, 28))
"""Working sets of the copies, source and target together, in bytes."""

LARGE: dict[str, Shape] = defaultdict(lambda: (4096, 4096, 4096), cpu=(512, 512, 512))
"""A product that fills the device, by the device's type."""

GRAPH_LENGTH = 100
"""Tiny kernels in the CUDA graph that is timed."""


# ------------------------------------------------------------------------------ what must be done


class Work(NamedTuple):
    """What a part cannot do without; the formulas are at the top of the file.

    Attributes:
        products: shapes (m, k, n) of its matrix products, each done for every member.
        num_bytes: read and written, each thing once.
        working_set: bytes that it comes by again and again, which decides the cache that serves it.
    """

    products: tuple[Shape, ...]
    num_bytes: int
    working_set: int

    def flops(self, num_members: int) -> int:
        return sum(2 * num_members * math.prod(shape) for shape in self.products)


def work_of(dqn: DQN, state: State) -> dict[str, Work]:
    """Work of every part, and of a "vector step" with one gradient step."""
    m, n, b = dqn.num_members, dqn.num_envs, dqn.batch_size
    layers = [*itertools.pairwise(dqn.network.widths)]
    act = [(n, fan_in, fan_out) for fan_in, fan_out in layers]
    update = [(b, *layer) for layer in layers] * (3 if dqn.double_q else 2)
    update += [(fan_in, b, fan_out) for fan_in, fan_out in layers]
    update += [(b, fan_out, fan_in) for fan_in, fan_out in layers[1:]]

    p, f, t = dqn.network.num_parameters, layers[0][0], dqn.replay.bytes_per_transition
    s, o = tree.num_bytes(state.env) // (m * n), state.env.obs.nbytes // (m * n)
    d = dqn.env.step_noise_dim + dqn.env.reset_noise_dim
    stored = dqn.replay.num_bytes

    def work(products: list[Shape], size: int, working_set: int = 0) -> Work:
        return Work(tuple(products), size, max(size, working_set))

    step_bytes = m * n * (2 * s + 4 * (d + 2) + t + 8) + 4 * m * p
    step_bytes += m * b * (8 + t) + 40 * m * p
    return {
        "env step": work([], m * n * (2 * s + 8 + 4 * d + o + 14)),
        "replay add": work([], m * n * (2 * o + 13 + t), stored),
        "replay sample": work([], m * b * (8 + t + 8 * f + 13), stored),
        "act": work(act, m * n * (o + 16) + 4 * m * p),
        "update": work(update, m * b * (8 * f + 13) + 40 * m * p),
        "vector step": work(act + update, step_bytes),
    }


class Counting(TorchDispatchMode):
    """Counts what is dispatched: operations that compute, by name, and views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.num_views = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        aliases = [result.alias_info for result in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            self.num_views += 1
        else:
            self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_launches(job: Job, device: torch.device) -> int:
    """Kernels that one call starts on a GPU; elsewhere operations that it dispatches."""
    if device.type != "cuda":
        with Counting() as counting:
            job()
        return counting.operations.total()
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        job()
        torch.cuda.synchronize(device)
    on_device = [e for e in profiled.events() or [] if str(e.device_type).endswith("CUDA")]
    return sum(not event.is_user_annotation for event in on_device)


# ------------------------------------------------------------------------------- what is measured


def stretch(job: Job, calls: int, device: torch.device) -> float:
    """Seconds that a number of calls takes."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        job()
    synchronise(device)
    return time.perf_counter() - start


def time_in_turns(
    jobs: Mapping[Any, Job], repeats: int, seconds: float, device: torch.device
) -> Iterator[dict[Any, float]]:
    """Seconds per call of every job, round after round.

    Args:
        jobs: what to call, by name; each is warmed up first.
        repeats: rounds, in each of which every job has its stretch.
        seconds: length of a stretch.
        device: to synchronise with.
    """
    calls: dict[Any, int] = {}
    for name, job in jobs.items():
        job()
        count = 1
        # The shorter of two, so that a stall of the machine does not end the search.
        while (duration := min(stretch(job, count, device) for _ in range(2))) < seconds / 4:
            count *= 2
        calls[name] = max(1, round(count * seconds / duration))
    for _ in range(repeats):
        yield {name: stretch(job, calls[name], device) / calls[name] for name, job in jobs.items()}


def product(shape: Shape, num_members: int, device: torch.device) -> Job:
    """One batched product of float32, written to memory that is there already."""
    m, k, n = shape
    x = torch.rand(num_members, m, k, device=device)
    y = torch.rand(num_members, k, n, device=device)
    out = torch.empty(num_members, m, n, device=device)
    return lambda: torch.bmm(x, y, out=out)


def copy(size: int, device: torch.device) -> Job:
    """A copy of size / 2 bytes, so that `size` bytes are touched."""
    source = torch.ones(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def launch(device: torch.device) -> Job:
    """The least that an operation can be: one number, changed in place."""
    return torch.zeros(1, device=device).neg_


def launch_in_graph(device: torch.device) -> Job:
    """A CUDA graph of GRAPH_LENGTH tiny kernels, each waiting for the one before."""
    x = torch.zeros(1, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_LENGTH):
            x.neg_()
    return graph.replay


class Rates(NamedTuple):
    """What the device can do, as measured in one round.

    Attributes:
        flops: fastest float32 product, FLOP/s.
        copies: bytes read and written per second, by working set; see COPY_SIZES.
        launch_s: seconds of a tiny operation.
        graph_s: the same inside a CUDA graph; elsewhere as `launch_s`.
    """

    flops: float
    copies: dict[int, float]
    launch_s: float
    graph_s: float

    def copy_rate(self, working_set: int) -> float:
        """The best rate at a working set of at least that size, so that a floor stays one."""
        start = max([size for size in self.copies if size <= working_set] or [min(self.copies)])
        return max(rate for size, rate in self.copies.items() if size >= start)


def probes(shapes: Collection[Shape], num_members: int, device: torch.device) -> dict[Any, Job]:
    """What is to be timed for `rates_of`: a large product and those of `shapes`, by shape; copies,
    by working set; launches, by name."""
    jobs: dict[Any, Job] = {
        "launch": launch(device),
        "large": product(LARGE[device.type], 1, device),
    }
    if device.type == "cuda":
        jobs["graph"] = launch_in_graph(device)
    jobs |= {shape: product(shape, num_members, device) for shape in sorted(shapes)}
    return jobs | {size: copy(size, device) for size in COPY_SIZES}


def gflops(seconds: float, shape: Shape, num_members: int = 1) -> float:
    return 2e-9 * num_members * math.prod(shape) / seconds


def rates_of(
    seconds: Mapping[Any, float],
    shapes: Collection[Shape],
    num_members: int,
    device: torch.device,
) -> Rates:
    """The rates of one round, from the seconds that each of `probes` took."""
    products = [gflops(seconds["large"], LARGE[device.type])]
    products += [gflops(seconds[shape], shape, num_members) for shape in shapes]
    return Rates(
        flops=1e9 * max(products),
        copies={size: size / seconds[size] for size in COPY_SIZES},
        launch_s=seconds["launch"],
        graph_s=seconds.get("graph", 0.0) / GRAPH_LENGTH or seconds["launch"],
    )


class Floor(NamedTuple):
    """Least time of a part, in seconds."""

    arithmetic: float
    copying: float
    launching: float

    @classmethod
    def of(
        cls, work: Work, launches: float, num_members: int, rates: Rates, in_graph: bool = False
    ) -> Floor:
        return cls(
            work.flops(num_members) / rates.flops,
            work.num_bytes / rates.copy_rate(work.working_set),
            launches * (rates.graph_s if in_graph else rates.launch_s),
        )

    @property
    def work(self) -> float:
        """Without launches."""
        return max(self.arithmetic, self.copying)

    def whole(self, device: torch.device) -> float:
        """With launches: in turn with the work on a CPU, beside it elsewhere."""
        if device.type == "cpu":
            return self.launching + self.work
        return max(self.launching, self.work)
