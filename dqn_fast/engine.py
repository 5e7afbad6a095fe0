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
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
"""Gradient steps from which `auto` waits for the compiler before it captures on a GPU."""


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
        long = num_updates >= AUTO_COMPILE_ON_CUDA
        compiled = missing is None and (long or name == "graph")
        what = "compiled kernels" if compiled else missing or f"plain kernels, {steps} are few"
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
    """

    name: str
    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    results: Any


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
        waited: seconds that the caller was kept waiting so far.
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
            EngineUnavailableError: a function cannot be traced.
        """
        self._graphs: list[torch.fx.GraphModule] = []
        self._constants: list[list[Tensor]] = []
        self._packages = []
        jobs: list[Path] = []
        for unit in units:
            try:
                graph, constants = self.trace(unit)
            except Exception as error:
                raise EngineUnavailableError(f"not traceable: {_first_line(error)}") from error
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
        """The compiled functions, in the order of `start`.

        Raises:
            EngineUnavailableError: the compiler failed.
        """
        if self._process is not None:
            _, log = self._process.communicate()
            code, self._process = self._process.returncode, None
            self.close()
            if code:
                lines = log.decode(errors="replace").strip().splitlines() or ["no message"]
                raise EngineUnavailableError(f"the compiler failed: {lines[-1][:200]}")
        if self._packages:
            try:
                runs = [_load(package) for package in self._packages]
            except RuntimeError as error:
                raise EngineUnavailableError(f"not loadable: {_first_line(error)}") from error
        else:
            runs = [_called_with_list(torch.compile(g, fullgraph=True)) for g in self._graphs]
        return [_with(run, more) for run, more in zip(runs, self._constants, strict=True)]

    @property
    def busy(self) -> bool:
        """Whether the compiler still works."""
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """Stop the compiler, if it runs, and remove what it was given."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


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
    parts = (graph.code, layout, torch.__version__, torch.get_num_threads(), flags)
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


def _first_line(error: BaseException) -> str:
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


@dataclass
class _Recording:
    replay: Callable[[], object]
    inputs: list[Tensor]
    outputs: Any


Record = Callable[[Callable[[], Any]], tuple[Callable[[], object], Any]]
"""Takes a call apart from running it: returns what runs it again, and its outputs."""


@dataclass
class Captured:
    """Replays calls of a function whose tensors stay where they are, each recorded once.

    Inputs are copied to where the recording reads them; outputs are overwritten by the next replay
    of the same recording, so they are to be used before.

    The first call with a new key runs as it is, on the stream on which it will be recorded: it is
    the warm-up that capture asks for, and does what it is called for. The second is recorded, which
    computes nothing, and replayed.

    Attributes:
        function: takes a key and nested tuples of tensors.
        record: `cuda_graph`, or for tests something that needs no GPU.
    """

    function: Callable[..., Any]
    record: Record
    _seen: set[Any] = field(default_factory=set)
    _recordings: dict[Any, _Recording] = field(default_factory=dict)

    MOST_RECORDINGS = 16

    def __call__(self, key: Any, *inputs: Any) -> Any:
        if key not in self._recordings:
            if key not in self._seen or len(self._recordings) == self.MOST_RECORDINGS:
                self._seen.add(key)
                return _on_side_stream(lambda: self.function(key, *inputs))
            static = [tensor.clone() for tensor in leaves(inputs)]
            arguments = refill(inputs, iter(static))
            replay, outputs = self.record(lambda: self.function(key, *arguments))
            self._recordings[key] = _Recording(replay, static, outputs)
        recording = self._recordings[key]
        for target, source in zip(recording.inputs, leaves(inputs), strict=True):
            target.copy_(source)
        recording.replay()
        return recording.outputs


_pool: Any = None


def cuda_graph(call: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
    """Record a call as a CUDA graph; all graphs share one memory pool, as they run in turn."""
    global _pool
    _pool = _pool or torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool):
        outputs = call()
    return graph.replay, outputs


def _on_side_stream(call: Callable[[], Any]) -> Any:
    """Run a call on another stream than the default one, where there are streams."""
    if not torch.cuda.is_available():
        return call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = call()
    torch.cuda.current_stream().wait_stream(stream)
    return result


if __name__ == "__main__":
    compile_packages(int(sys.argv[1]), sys.argv[2:])
