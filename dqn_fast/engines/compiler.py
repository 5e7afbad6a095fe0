"""Functions of a state, traced and compiled for exactly the shapes of one run.

Every tensor of the state keeps its address, noise and schedules are input tensors, and no function
reads a value on the host. So a function is traced and compiled once: its graph never changes, and
a call checks no guards.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dqn_fast import tree
from dqn_fast.device import first_line
from dqn_fast.engines import packages, watched
from dqn_fast.engines.cache import (
    UnusableFileError,
    WorkFolder,
    instruction_sets,
    read_whole,
    remove,
    subfolder,
    sweep,
    usable_cache,
)
from dqn_fast.engines.choice import EngineUnavailableError, StopRequested

NARROW = 8
"""Products with at most this many output columns are compiled as multiply-and-sum, so that Inductor
fuses them with their neighbours: [64, 128] x [128, 2] takes 1 to 3 us with them, and 10 to 11 us
alone as a product of MKL. Products with so few inner terms are compiled in the same way."""

POLL_S = 0.1
"""Seconds between two questions whether to go on waiting for the compiler."""

LOG = "log"
"""File of the second process's messages, in its folder."""


class Traced(NamedTuple):
    """A function to trace and compile.

    Attributes:
        name: of the function, in messages and file names.
        function: takes the state and the inputs; returns a tree of tensors.
        inputs: trees of tensors; real inputs have their shapes, dtypes and strides.
        exact: whether the compiled function must return the same bits; its first call checks this.
    """

    name: str
    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    exact: bool = False


CompiledFn = Callable[[list[Tensor]], object]
"""A compiled function. It takes one list, which it may empty: the tensors of the state, of the
inputs and of the results. It writes state and results, so no tensor that it makes outlives it."""


class Compiler:
    """Compiles functions of one state.

    Tracing uses fake tensors, so it computes nothing and writes nothing. On a CPU a second process
    compiles the traced function to a shared library inside the cache (see cache.py), and the next
    run with the same shapes loads it in milliseconds. A call of it costs 10 us; one of
    `torch.compile` costs 35 us and more with as many tensors. On a GPU `torch.compile` compiles the
    traced function.

    The second process ends with this one, however this one ends (see watched.py).

    Attributes:
        state: tensors of the state, in the order of `tree.leaves`; compiled functions read them and
            write them in place.
        results: buffers for the results of each function, a tree by name.
        notes: what is wrong with the cache or with a file in it, for the user.
    """

    def __init__(self, state: Any) -> None:
        self._tree = state
        self.state = [tensor.detach() for tensor in tree.leaves(state)]
        self._learns = [tensor.requires_grad for tensor in tree.leaves(state)]
        self.results: dict[str, Any] = {}
        self.notes: list[str] = []
        self._work: WorkFolder | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._packages: list[Path] = []

    def _call(self, traced: Traced, tensors: Iterable[Tensor]) -> Any:
        """Call the function with `tensors` in place of those of the state and of the inputs."""
        given = iter(tensors)
        carried = [
            tensor.detach().requires_grad_() if learns else tensor
            for learns, tensor in zip(self._learns, given, strict=False)
        ]
        return traced.function(
            tree.replace(self._tree, carried), *tree.replace(traced.inputs, given)
        )

    def _find_results(self, traced: Traced) -> Any:
        """Zeros in the shapes of the results, which a call with fake tensors gives."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(t) for t in (*self.state, *tree.leaves(traced.inputs))]
            made = self._call(traced, fake)
        return tree.replace(
            made, [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in tree.leaves(made)]
        )

    def trace(self, traced: Traced) -> tuple[torch.fx.GraphModule, list[Tensor]]:
        """Trace the function, gradients included, to one graph of plain operations.

        Returns:
            The graph, and the constants of the function, such as an environment's tables. The graph
            takes the tensors of the state, of the inputs, of the results, which it writes, and the
            constants.

        Raises:
            Exception: the function cannot be traced as a whole.
        """
        from torch.fx.experimental.proxy_tensor import make_fx

        num_given = len(self.state) + len(tree.leaves(traced.inputs))

        def flat(*tensors: Tensor) -> list[Tensor]:
            made = tree.leaves(self._call(traced, tensors[:num_given]))
            for result, tensor in zip(tensors[num_given:], made, strict=True):
                result.copy_(tensor.detach())
            return [tensors[0].new_zeros(())]  # export takes no function without an output

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about names it deprecated
            self.results[traced.name] = self._find_results(traced)
            graph = make_fx(
                flat,
                decomposition_table=_decompositions(self.state[0].device),
                tracing_mode="fake",
                _allow_non_fake_inputs=True,
            )(*self._example(traced))
        return graph, _lift_constants(graph)

    def _example(self, traced: Traced) -> list[Tensor]:
        # A tensor that is given twice would be taken for one input.
        more = tree.leaves((traced.inputs, self.results[traced.name]))
        return [*self.state, *(tensor.clone() for tensor in more)]

    def start(self, functions: Iterable[Traced]) -> None:
        """Start compiling; `finish` waits for the end.

        Raises:
            EngineUnavailableError: a function cannot be traced, or the compiler cannot be started.
        """
        self._functions = list(functions)
        try:
            self._start()
        except Exception as error:
            self.close()
            raise EngineUnavailableError(f"not compilable: {first_line(error)}") from error

    def _start(self) -> None:
        self._graphs: list[torch.fx.GraphModule] = []
        self._constants: list[list[Tensor]] = []
        self._packages = []
        self._loaded: dict[Path, CompiledFn] = {}
        cache, problem = usable_cache()
        self.notes = [problem] if problem else []
        on_cpu = self.state[0].device.type == "cpu"
        if on_cpu:
            sweep(cache)
            self._work = WorkFolder(cache)
        else:
            _keep_torchs_cache_in(cache)
        jobs: list[Path] = []
        for traced in self._functions:
            graph, constants = self.trace(traced)
            self._graphs.append(graph)
            self._constants.append(constants)
            if not on_cpu:
                continue
            example = (*self._example(traced), *constants)
            package = cache / f"{traced.name}-{_key(graph, example)}.package"
            self._packages.append(package)
            if package not in jobs and not self._is_loaded(package):
                jobs += [self._export(graph, example, f"{len(jobs)}.pt2"), package]
        if jobs:
            self._compile(jobs)

    def _is_loaded(self, package: Path) -> bool:
        """Load a package if there is one; remove one that cannot be used."""
        assert self._work is not None
        try:
            self._loaded[package] = _load(package, self._work.path)
        except FileNotFoundError:
            return False
        except Exception as error:
            why = str(error) if isinstance(error, UnusableFileError) else "cannot be loaded"
            self.notes.append(f"{package} {why}, so it is made again")
            remove(package)
            return False
        return True

    def _export(self, graph: torch.fx.GraphModule, example: tuple[Tensor, ...], name: str) -> Path:
        """Write a graph for the second process; the tensors of the example are not written."""
        assert self._work is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(graph, example)
            program._example_inputs = None  # the whole replay; the setter takes no None
            path = self._work.path / name
            torch.export.save(program, path)
        return path

    def _compile(self, jobs: list[Path]) -> None:
        """Start the second process."""
        assert self._work is not None
        folder = self._work.path
        inductor = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
        environ = {name: value for name, value in os.environ.items() if name not in inductor}
        # Inductor's default folders are then inside ours. One graph is one file in C++: no pool.
        environ |= {"TMPDIR": str(folder), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]); "
            "from dqn_fast.engines.packages import main; main(sys.argv[2:])"
        )
        words = [str(Path(__file__).parents[2]), str(torch.get_num_threads()), str(folder)]
        command = [sys.executable, "-P", "-c", program, *words, *map(str, jobs)]
        self._process = watched.start(
            command, str(folder), self._work.lock, str(folder / LOG), environ
        )

    def finish(self, should_stop: Callable[[], bool] = lambda: False) -> list[CompiledFn]:
        """Wait for the compiler, and call every function once on copies of its tensors.

        Args:
            should_stop: asked while the compiler works, every 0.1 s.

        Returns:
            The compiled functions, in the order of `start`.

        Raises:
            EngineUnavailableError: the compiler failed, or a function cannot be loaded or called;
                the state was not written.
            StopRequested: `should_stop` returned true; the state was not written.
        """
        try:
            return self._finish(should_stop)
        except (EngineUnavailableError, StopRequested):
            raise
        except Exception as error:
            raise EngineUnavailableError(f"not usable: {first_line(error)}") from error
        finally:
            self.close()

    def _finish(self, should_stop: Callable[[], bool]) -> list[CompiledFn]:
        self._wait(should_stop)
        runs = self._load()
        for traced, run, graph, more in zip(
            self._functions, runs, self._graphs, self._constants, strict=True
        ):
            if should_stop():  # on a GPU the next line compiles
                raise StopRequested
            try:
                self._try(traced, run, graph, more)
            except Exception as error:
                what = f"{traced.name} does not run: {first_line(error)}"
                raise EngineUnavailableError(what) from error
        return [_append(run, more) for run, more in zip(runs, self._constants, strict=True)]

    def _wait(self, should_stop: Callable[[], bool]) -> None:
        """Wait for the second process."""
        if self._process is None:
            return
        assert self._work is not None
        code = None
        while code is None:
            try:
                code = self._process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                if should_stop():
                    raise StopRequested from None
        if code:
            if should_stop():  # whoever stops this process may have stopped that one
                raise StopRequested
            log = (self._work.path / LOG).read_text(errors="replace")
            lines = log.strip().splitlines() or ["no message"]
            raise EngineUnavailableError(f"the compiler failed: {lines[-1][:200]}")

    def _load(self) -> list[CompiledFn]:
        if not self._packages:
            options = inductor_options(torch.__version__)
            compiled = (torch.compile(g, fullgraph=True, options=options) for g in self._graphs)
            return [_take_list(function) for function in compiled]
        assert self._work is not None
        for package in self._packages:
            if package in self._loaded:
                continue
            try:
                self._loaded[package] = _load(package, self._work.path)
            except Exception as error:
                remove(package)  # or the next run would load it again
                raise EngineUnavailableError(f"not loadable: {first_line(error)}") from error
        return [self._loaded[package] for package in self._packages]

    def _try(
        self, traced: Traced, run: CompiledFn, graph: Callable[..., Any], constants: list[Tensor]
    ) -> None:
        """Call a compiled function on copies of its tensors; on a GPU this call compiles it.

        Raises:
            RuntimeError: an exact function returns other numbers than the plain one.
            Exception: the call failed.
        """
        ours = [tensor.detach().clone() for tensor in self._example(traced)]
        results = ours[len(ours) - len(tree.leaves(self.results[traced.name])) :]
        torch._foreach_zero_(results)  # copies may already hold the right numbers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Inductor's own, about precision and deprecated names
            run([*ours, *constants])
        if ours[0].device.type == "cuda":  # errors of kernels come late
            torch.cuda.current_stream(ours[0].device).synchronize()
        if traced.exact:  # it does not write the state
            made = [tensor.clone() for tensor in results]
            with torch.no_grad():
                graph(*ours, *constants)
            if not all(torch.equal(a, b) for a, b in zip(made, results, strict=True)):
                raise RuntimeError("its numbers are not those of the plain function")

    def close(self) -> None:
        """Stop the compiler if it runs, and remove its files."""
        if self._process is not None:
            watched.stop(self._process)
            self._process = None
        if self._work is not None:
            self._work.close()
            self._work = None


def inductor_options(torch_version: str) -> dict[str, Any]:
    """Options that Inductor needs on a GPU in a version of torch, for our functions only.

    Args:
        torch_version: such as "2.11.0+cu130".
    """
    release = tuple(int(part) for part in torch_version.split(".")[:2])
    if release < (2, 13):
        # Adam and the gradient norm are `_foreach_*` and reductions of tensors in several shapes.
        # Fusing them fails in 2.11 with an assertion (pytorch#176591); 2.13 fixes it.
        return {"loop_ordering_after_fusion": False}
    return {}


def _decompositions(device: torch.device) -> dict[Any, Callable[..., Any]]:
    """Faster forms of matrix products for a CPU; on a GPU they stay as they are."""
    if device.type != "cpu":
        return {}

    def baddbmm(bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        # Inductor fuses the addition with the next operation; `baddbmm` copies the bias first.
        return torch.bmm(x, y) + bias if beta == alpha == 1 else NotImplemented

    def bmm(x: Tensor, y: Tensor) -> Tensor:
        if x.shape[-1] <= NARROW:
            return (x.unsqueeze(-1) * y.unsqueeze(-3)).sum(-2)
        if y.shape[-1] > NARROW:
            return torch.ops.dqn_fast.product(x, y) if packages.own_product(x) else NotImplemented
        if x.stride(-1) == 1:  # sum along contiguous memory
            return (x.unsqueeze(-2) * y.mT.unsqueeze(-3)).sum(-1)
        return (x.mT.unsqueeze(-3) * y.mT.unsqueeze(-1)).sum(-2).mT

    return {torch.ops.aten.baddbmm.default: baddbmm, torch.ops.aten.bmm.default: bmm}


def _key(graph: torch.fx.GraphModule, example: Sequence[Tensor]) -> str:
    """Hash of everything that the compiled function depends on."""
    digest = hashlib.sha256()
    layout = [(str(t.dtype), tuple(t.shape), t.stride()) for t in example]
    settings = (torch.get_num_threads(), torch.get_float32_matmul_precision())
    parts = (graph.code, layout, torch.__version__, *settings, instruction_sets())
    for part in (*parts, platform.machine(), packages.PRODUCT.read_text()):
        digest.update(repr(part).encode())
    return digest.hexdigest()[:32]


def _load(package: Path, folder: Path) -> CompiledFn:
    """The function in a compiled package.

    Exactly the bytes that were checked are loaded, from a private `folder`, whose files need not
    stay. `torch._inductor.aoti_load_package` would unpack them to /tmp.
    """
    content = read_whole(package)
    unpacked = tempfile.mkdtemp(dir=folder)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(unpacked)
    (library,) = Path(unpacked).rglob("*.so")
    run: CompiledFn = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1).run
    return run


_torchs_cache: set[str] = set()


def _keep_torchs_cache_in(cache: Path) -> None:
    """Let `torch.compile` keep what it makes in this process in our cache, unless the user named a
    folder; its default is in /tmp, and torch never checks whose it is."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    asked = os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    if asked == default_cache_dir() or asked in _torchs_cache:
        ours = str(subfolder(cache, "torch"))
        _torchs_cache.add(ours)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = ours


def _append(run: CompiledFn, constants: list[Tensor]) -> CompiledFn:
    """Make a function that calls `run` with `constants` appended to its list."""
    return (lambda tensors: run(tensors + constants)) if constants else run


def _lift_constants(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Turn the tensors that a graph holds into its last inputs; return the tensors."""
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


def _take_list(function: Callable[..., Any]) -> CompiledFn:
    """Make a function that takes the arguments of `function` in a list."""

    def run(tensors: list[Tensor]) -> None:
        with torch.no_grad():
            function(*tensors)

    return run
