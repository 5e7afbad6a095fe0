"""How the functions of a vector step are run: plainly, compiled, or captured in a CUDA graph.

The functions are the same whatever the engine. What an engine relies on, and the tests hold the
step to: every tensor that lives longer than a chunk keeps its address, noise and schedules come in
as tensors, and nothing is read on the host. So a function of the carried tensors and of its inputs
is traced once, compiled for exactly these shapes, and never again: there is nothing to guard on.

Run as a program, this file is the compiler: `Compiler` starts it beside the loop.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

EngineName = Literal["auto", "eager", "compile", "graph"]

NARROW = 8
"""Columns up to which a matrix product is compiled as multiplications and sums, which fuse with
what stands around them; the routines for matrices take 10 us for [64, 128] x [128, 2], four times
what they take for eight times the work."""

AUTO_SWITCH = 16_384
"""Gradient steps after which `auto` changes over on a CPU. A fixed number, so that a run can be
repeated; compiling, 30 to 40 s on another core, is done by then or nearly so."""

AUTO_COMPILE_ON_CUDA = 100_000
"""Gradient steps from which `auto` waits for the compiler before it captures on a GPU: compiled
kernels save 0.6 ms a vector step with one gradient step (990 and 390 us on an H100, 813 and 273
with 132 members), so a minute of compiling pays from here on."""

RECORDED_STEPS = 32
"""Vector steps that a recording holds at most. To replay one costs the host about 0.1 ms, which the
GPU does not wait for where it holds 16 steps or more; to record one costs what its steps cost."""


class EngineUnavailableError(RuntimeError):
    """An engine cannot run here; the message says why, in a few words."""


# ------------------------------------------------------------------------------- which engine


@dataclass(frozen=True)
class Choice:
    """How a run is to be executed.

    Attributes:
        engine: "eager", "compile" or "graph".
        compiled: whether compiled functions are used, in or outside a graph.
        switch: gradient steps that are taken plainly before; None: no change in mid-run.
        reason: why, in a few words.
    """

    engine: EngineName
    compiled: bool
    reason: str
    switch: int | None = None


def choose_engine(
    name: EngineName, device: torch.device, num_updates: int, on_host: bool = False
) -> Choice:
    """The engine that `name` stands for, and why.

    Args:
        name: what was asked for. An engine that cannot be had here is no error: the next best one
            runs, and the reason says so.
        device: of the run.
        num_updates: gradient steps to come.
        on_host: whether the environment lives outside torch, which no graph can capture.
    """
    missing = why_not_compiled(device)
    steps = f"{num_updates:,} gradient steps"
    if name == "eager":
        return Choice("eager", False, "asked for")
    if name == "compile":
        if missing:
            return Choice("eager", False, f"compile cannot be had: {missing}")
        return Choice("compile", True, "asked for")
    if device.type == "cuda" and not on_host:
        pays = num_updates >= AUTO_COMPILE_ON_CUDA
        compiled = missing is None and (pays or name == "graph")
        what = "compiled kernels" if compiled else "plain kernels"
        if name == "auto":
            what += f", {steps} {'pay' if pays else 'do not pay'} for compiling"
        if missing:
            what = f"plain kernels, {missing}"
        return Choice("graph", compiled, f"{'asked for' if name == 'graph' else 'CUDA'}; {what}")
    if name == "graph":
        where = "an environment on the host" if on_host else f"no CUDA graphs on {device.type}"
        if missing:
            return Choice("eager", False, f"graph cannot be had: {where}; {missing}")
        return Choice("compile", True, f"graph cannot be had: {where}")
    if missing:
        return Choice("eager", False, missing)
    if num_updates < 2 * AUTO_SWITCH:
        return Choice("eager", False, f"{steps} take no longer than compiling")
    return Choice("compile", True, f"{steps}, the first {AUTO_SWITCH:,} eager", AUTO_SWITCH)


def without_compiler(choice: Choice, why: str) -> Choice:
    """The next best choice where compiled functions cannot be had: plain ones, in a graph if that
    was chosen."""
    if choice.engine == "graph":
        return Choice("graph", False, f"plain kernels, {why}")
    return Choice("eager", False, why)


def why_not_compiled(device: torch.device) -> str | None:
    """What the compiler lacks for `device`; None where it can be used."""
    if device.type == "cpu":
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            return "no C++ compiler"
        return None
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "no Triton"
    return f"no compiler for {device.type}"


# ----------------------------------------------------------------------------------- compiling


def leaves(value: Any) -> list[Tensor]:
    """All tensors in nested tuples and lists, in order; None has none."""
    if isinstance(value, Tensor):
        return [value]
    return [] if value is None else [tensor for item in value for tensor in leaves(item)]


class Unit(NamedTuple):
    """A function of the carried tensors and of some inputs.

    Attributes:
        name: for messages and file names.
        function: takes the object that carries the tensors, and the inputs; returns nested tuples
            or lists of tensors.
        inputs: nested tuples and lists of tensors, as the function takes them.
        results: tensors in the shapes of what it returns, nested alike.
        exact: whether compiled it must return the same bits, which the first call then checks.
    """

    name: str
    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    results: Any
    exact: bool = False


Run = Callable[[list[Tensor]], object]
"""A compiled function: takes the carried tensors, the inputs and the results, flat, in one list
that it may empty, and writes the results. So a call makes no tensor that outlives it."""


class Compiler:
    """Compiles functions over the tensors of one carrier, in a process beside this one.

    A function is traced with stand-ins for the tensors, so nothing is computed and nothing is
    written. On a CPU what comes out is a shared library that is kept beside torch's own cache and
    loaded in milliseconds by the next run of the same shapes; a call costs 10 us, where one of
    `torch.compile` costs 35 us and more with this many tensors. On a GPU `torch.compile` is called
    on the traced function.

    Attributes:
        state: the carried tensors; read and written in place by what is compiled.
    """

    def __init__(self, state: Sequence[Tensor], carrier: Callable[[Sequence[Tensor]], Any]) -> None:
        """Remember what is carried.

        Args:
            state: every tensor that outlives a call.
            carrier: makes the carrier over other tensors in place of these.
        """
        self.state = [tensor.detach() for tensor in state]
        self._learns = [tensor.requires_grad for tensor in state]
        self._carrier = carrier
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._packages: list[Path] = []

    def trace(self, unit: Unit) -> tuple[torch.fx.GraphModule, list[Tensor]]:
        """The function as one graph of plain operations, gradients included; a whole graph or an
        error, as with `fullgraph`.

        Returns:
            The graph, a function of the carried tensors, the inputs, the results, which it writes,
            and some more tensors; and these: what the function reads beside, such as an
            environment's tables.
        """
        from torch.fx.experimental.proxy_tensor import make_fx

        def flat(*tensors: Tensor) -> list[Tensor]:
            state, rest = tensors[: len(self.state)], iter(tensors[len(self.state) :])
            carried = [
                tensor.detach().requires_grad_() if learns else tensor
                for tensor, learns in zip(state, self._learns, strict=True)
            ]
            inputs = refill(unit.inputs, rest)
            made = unit.function(self._carrier(carried), *inputs)
            for result, tensor in zip(rest, leaves(made), strict=True):
                result.copy_(tensor.detach())
            return [tensors[0].new_zeros(())]  # export takes no function without an output

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about names it deprecated
            graph = make_fx(
                flat,
                decomposition_table=_decompositions(self.state[0].device),
                tracing_mode="fake",
                _allow_non_fake_inputs=True,
            )(*self._example(unit))
        return graph, _lift_constants(graph)

    def _example(self, unit: Unit) -> list[Tensor]:
        # A tensor that is given twice would be taken for one input.
        return [*self.state, *(tensor.clone() for tensor in leaves((unit.inputs, unit.results)))]

    def start(self, units: Iterable[Unit]) -> None:
        """Begin to compile; `finish` waits for the end.

        Raises:
            EngineUnavailableError: a function cannot be traced, or the compiler not be started.
        """
        self._units = list(units)
        try:
            self._start()
        except Exception as error:
            self.close()
            raise EngineUnavailableError(f"not compilable: {first_line(error)}") from error

    def _start(self) -> None:
        self._graphs: list[torch.fx.GraphModule] = []
        self._constants: list[list[Tensor]] = []
        self._packages = []
        jobs: list[Path] = []
        for unit in self._units:
            graph, constants = self.trace(unit)
            self._graphs.append(graph)
            self._constants.append(constants)
            if self.state[0].device.type != "cpu":
                continue
            example = (*self._example(unit), *constants)
            package = _cache() / f"{unit.name}-{_key(graph, example)}.pt2"
            self._packages.append(package)
            if not package.exists() and package not in jobs:
                self._folder = self._folder or tempfile.TemporaryDirectory()
                source = Path(self._folder.name) / f"{len(jobs) // 2}.pt2"
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    torch.export.save(torch.export.export(graph, example), source)
                jobs += [source, package]
        if jobs:
            command = [sys.executable, __file__, str(torch.get_num_threads()), *map(str, jobs)]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )

    def finish(self) -> list[Run]:
        """The compiled functions, in the order of `start`, each of which has run once on copies of
        its tensors.

        Raises:
            EngineUnavailableError: the compiler failed, or what it made cannot be loaded or run;
                nothing that is carried was written.
        """
        try:
            return self._finish()
        except EngineUnavailableError:
            raise
        except Exception as error:
            raise EngineUnavailableError(f"not usable: {first_line(error)}") from error

    def _finish(self) -> list[Run]:
        if self._process is not None:
            _, log = self._process.communicate()
            code, self._process = self._process.returncode, None
            self.close()
            if code:
                lines = log.decode(errors="replace").strip().splitlines() or ["no message"]
                raise EngineUnavailableError(f"the compiler failed: {lines[-1][:200]}")
        runs = self._load()
        for unit, run, graph, more in zip(
            self._units, runs, self._graphs, self._constants, strict=True
        ):
            try:
                self._try(unit, run, graph, more)
            except Exception as error:
                what = f"{unit.name} does not run: {first_line(error)}"
                raise EngineUnavailableError(what) from error
        return [_with(run, more) for run, more in zip(runs, self._constants, strict=True)]

    def _load(self) -> list[Run]:
        if not self._packages:
            options = inductor_options(torch.__version__)
            compiled = (torch.compile(g, fullgraph=True, options=options) for g in self._graphs)
            return [_called_with_list(function) for function in compiled]
        runs: list[Run] = []
        errors: list[Exception] = []
        for package in self._packages:
            try:
                runs.append(_load(package))
            except Exception as error:
                errors.append(error)
                with contextlib.suppress(OSError):  # or every run to come would find it damaged
                    package.unlink()
        if errors:
            what = f"not loadable: {first_line(errors[0])}"
            raise EngineUnavailableError(what) from errors[0]
        return runs

    def _try(
        self, unit: Unit, run: Run, graph: Callable[..., Any], constants: list[Tensor]
    ) -> None:
        """Call a compiled function on copies; on a GPU this is what compiles it.

        Raises:
            RuntimeError: an exact function returns other numbers than the plain one.
            Exception: whatever goes wrong.
        """
        ours = [tensor.detach().clone() for tensor in self._example(unit)]
        results = ours[len(ours) - len(leaves(unit.results)) :]
        torch._foreach_zero_(results)  # they may hold the right numbers already
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Inductor's own, about precision and deprecated names
            run([*ours, *constants])
        if ours[0].device.type == "cuda":  # errors of kernels come late
            torch.cuda.current_stream(ours[0].device).synchronize()
        if unit.exact:  # it writes its results and nothing else
            made = [tensor.clone() for tensor in results]
            with torch.no_grad():
                graph(*ours, *constants)
            if not all(torch.equal(a, b) for a, b in zip(made, results, strict=True)):
                raise RuntimeError("its numbers are not those of the plain function")

    def close(self) -> None:
        """Stop the compiler, if it runs, and remove what it was given."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def inductor_options(torch_version: str) -> dict[str, Any]:
    """Options of Inductor that this version of torch needs for a GPU; for our own functions only.

    Args:
        torch_version: of torch, such as "2.11.0+cu130".
    """
    release = tuple(int(part) for part in torch_version.split(".")[:2])
    if release < (2, 13):
        # Fusing `_foreach_*` with reductions of tensors in several shapes, which Adam and the
        # gradient norm are, fails in 2.11 with an assertion (pytorch#176591); mended in 2.13.
        return {"loop_ordering_after_fusion": False}
    return {}


def refill(structure: Any, tensors: Iterator[Tensor]) -> Any:
    """`structure`, nested tuples and lists, with its tensors replaced by the next of `tensors`."""
    if isinstance(structure, Tensor):
        return next(tensors)
    if structure is None:
        return None
    items = [refill(item, tensors) for item in structure]
    if isinstance(structure, tuple):
        return type(structure)(*items) if hasattr(structure, "_fields") else tuple(items)
    return items


def _decompositions(device: torch.device) -> dict[Any, Callable[..., Any]]:
    """Products as the CPU's compiler makes the best of them; on a GPU they stay as they are."""
    if device.type != "cpu":
        return {}

    def baddbmm(bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        # Adding the bias joins the operation behind it; the product would copy it first.
        return torch.bmm(x, y) + bias if beta == alpha == 1 else NotImplemented

    def bmm(x: Tensor, y: Tensor) -> Tensor:
        if x.shape[-1] <= NARROW:
            return (x.unsqueeze(-1) * y.unsqueeze(-3)).sum(-2)
        if y.shape[-1] > NARROW:
            return torch.ops.dqn_fast.product(x, y) if _own_product(x) else NotImplemented
        if x.stride(-1) == 1:  # sums along what lies together in memory
            return (x.unsqueeze(-2) * y.mT.unsqueeze(-3)).sum(-1)
        return (x.mT.unsqueeze(-3) * y.mT.unsqueeze(-1)).sum(-2).mT

    return {torch.ops.aten.baddbmm.default: baddbmm, torch.ops.aten.bmm.default: bmm}


def _shape_of_product(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], y.shape[2]))


# The matrix product of compiled functions, see product.cpp; whatever else calls it gets torch's.
if not hasattr(torch.ops.dqn_fast, "product"):  # a module may be loaded again
    torch.library.define(
        "dqn_fast::product", "(Tensor x, Tensor y) -> Tensor", tags=(torch.Tag.flexible_layout,)
    )
    torch.library.register_fake("dqn_fast::product", _shape_of_product)
    torch.library.impl("dqn_fast::product", "cpu", torch.bmm)

PRODUCT = Path(__file__).with_name("product.cpp")


def _own_product(x: Tensor) -> bool:
    """Whether `product.cpp` can multiply and is faster; on several threads torch's shares work."""
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return fast and torch.get_num_threads() == 1 and x.dtype == torch.float32


def _cache() -> Path:
    """Folder of compiled functions, inside torch's own cache (TORCHINDUCTOR_CACHE_DIR)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir()) / "dqn_fast"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(graph: torch.fx.GraphModule, example: Sequence[Tensor]) -> str:
    """Digest of everything that the compiled function depends on."""
    digest = hashlib.sha256()
    flags = ""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    layout = [(str(t.dtype), tuple(t.shape), t.stride()) for t in example]
    settings = (torch.get_num_threads(), torch.get_float32_matmul_precision())
    parts = (graph.code, layout, torch.__version__, *settings, flags)
    for part in (*parts, platform.machine(), PRODUCT.read_text()):
        digest.update(repr(part).encode())
    return digest.hexdigest()[:32]


def _load(package: Path) -> Run:
    """The function in a compiled package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run: Run = torch._inductor.aoti_load_package(str(package)).loader.boxed_run
    return run


def _with(run: Run, constants: list[Tensor]) -> Run:
    """`run` with `constants` behind what it is called with."""
    return (lambda tensors: run(tensors + constants)) if constants else run


def _lift_constants(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Turn the tensors that a graph holds into inputs, the last ones; returns them."""
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    lifted: dict[str, torch.fx.Node] = {}
    constants: list[Tensor] = []
    for node in list(graph.graph.nodes):
        name = str(node.target)
        if node.op != "get_attr" or not isinstance(value := getattr(graph, name), Tensor):
            continue
        if name not in lifted:
            constants.append(value.detach())
            with graph.graph.inserting_after(last):
                last = lifted[name] = graph.graph.placeholder(f"constant_{len(constants)}")
        node.replace_all_uses_with(lifted[name])
        graph.graph.erase_node(node)
    for name in lifted:
        delattr(graph, name)
    graph.recompile()
    return constants


def _called_with_list(function: Callable[..., Any]) -> Run:
    def run(tensors: list[Tensor]) -> None:
        with torch.no_grad():
            function(*tensors)

    return run


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def compile_packages(num_threads: int, jobs: Sequence[str]) -> None:
    """Compile exported graphs into packages.

    Args:
        num_threads: that the compiled functions will use.
        jobs: for each of them the file of `torch.export.save` and the package to write.
    """
    torch.set_num_threads(num_threads)
    for source, target in zip(jobs[::2], jobs[1::2], strict=True):
        partial = Path(target).with_suffix(f".{os.getpid()}.pt2")
        program = torch.export.load(source)
        product = torch.ops.dqn_fast.product.default
        used = any(node.target is product for node in program.graph.nodes)
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(partial),
            inductor_configs=_with_product(Path(source).parent) if used else {},
        )
        partial.replace(target)


@functools.cache
def _with_product(folder: Path) -> dict[str, Any]:
    """Build `product.cpp` in `folder`; the options with which Inductor calls and links it."""
    include, built = Path(torch.__file__).with_name("include"), folder / "product.o"
    flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", f"-I{include}"]
    compiler = [os.environ.get("CXX", "g++"), *flags]
    for command in (
        [*compiler, "-c", str(PRODUCT), "-o", str(built)],
        ["ar", "rcs", str(folder / "libdqn_fast_product.a"), str(built)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{PRODUCT.name}: {(done.stderr.splitlines() or ['failed'])[0]}")
    # Where compilers look for what is linked.
    paths = [str(folder), os.environ.get("LIBRARY_PATH", "")]
    os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    declaration = (
        "AOTITorchError aoti_torch_cpu_product"
        "(AtenTensorHandle x, AtenTensorHandle y, AtenTensorHandle* out)"
    )
    return {
        "aot_inductor.custom_ops_to_c_shims": {torch.ops.dqn_fast.product.default: [declaration]},
        "aot_inductor.custom_op_libs": ["dqn_fast_product"],
    }


# ----------------------------------------------------------------------------------- capturing


class Recorder(Protocol):
    """Records calls, to run them again without their Python."""

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Run a call as it is, where calls like it will be recorded."""

    def record(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Record a call, which computes nothing; returns what runs it and gives its outputs."""


_capturing = threading.Lock()


class CudaGraphs:
    """Records calls as CUDA graphs on one stream, in one memory pool, because they run in turn.

    Stream and pool belong to this object: other recorders of the process, earlier ones, later ones
    and those of other threads, share neither.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Run a call on the stream of the recordings: kernels are loaded, workspaces are made."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = call()
        current.wait_stream(self._stream)
        return result

    def record(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Capture a call, which computes nothing; every replay writes the same outputs."""
        graph = torch.cuda.CUDAGraph()
        # One at a time, because torch waits for the whole device first, which breaks a capture in
        # another thread; thread_local, because whatever else other threads ask for does not.
        with (
            _capturing,
            torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ),
        ):
            outputs = call()

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay


class _Recording(NamedTuple):
    replay: Callable[[], Any]
    inputs: list[Tensor]


class Captured:
    """Replays calls of a function whose tensors stay where they are, each kind recorded once.

    Inputs are copied to where the recording reads them; outputs are overwritten by the next replay
    of the same recording, so they are to be used before.

    A call whose key has a part that no call had before runs as it is: it is the warm-up that
    capture asks for, and does what it is called for. All other calls are recorded, which computes
    nothing, and replayed.

    Attributes:
        num_plain: calls that ran as they are.
        num_recordings: calls that were recorded.
    """

    MOST_RECORDINGS = 64

    def __init__(self, function: Callable[..., Any], recorder: Recorder) -> None:
        """Record nothing yet.

        Args:
            function: takes a key, a tuple that says what kind of call it is, and nested tuples of
                tensors.
            recorder: `CudaGraphs`, or for tests something that needs no GPU.
        """
        self._function, self._recorder = function, recorder
        self._warm: set[Any] = set()
        self._recordings: dict[tuple[Any, ...], _Recording] = {}
        self.num_plain = 0

    @property
    def num_recordings(self) -> int:
        return len(self._recordings)

    def __call__(self, key: tuple[Any, ...], *inputs: Any) -> Any:
        """Call the function.

        Raises:
            EngineUnavailableError: the call cannot be recorded; it did not run.
        """
        recording = self._recordings.get(key)
        if recording is None:
            if not self._warm.issuperset(key) or self.num_recordings == self.MOST_RECORDINGS:
                self._warm.update(key)
                self.num_plain += 1
                return self._recorder.warm_up(lambda: self._function(key, *inputs))
            recording = self._recordings[key] = self._record(key, inputs)
        torch._foreach_copy_(recording.inputs, leaves(inputs))
        return recording.replay()

    def _record(self, key: tuple[Any, ...], inputs: Any) -> _Recording:
        try:
            static = [tensor.clone() for tensor in leaves(inputs)]
            arguments = refill(inputs, iter(static))
            replay = self._recorder.record(lambda: self._function(key, *arguments))
        except Exception as error:
            raise EngineUnavailableError(f"capture failed: {first_line(error)}") from error
        return _Recording(replay, static)


if __name__ == "__main__":
    compile_packages(int(sys.argv[1]), sys.argv[2:])
