"""Functions of a state, traced and compiled for exactly the shapes of one run.

Every tensor of the state keeps its address, noise and schedules are input tensors, and no function
reads a value on the host. So a function is traced and compiled once: its graph never changes, and
a call checks no guards.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dqn_fast import tree
from dqn_fast.device import first_line
from dqn_fast.engines import packages
from dqn_fast.engines.choice import EngineUnavailableError

NARROW = 8
"""Products with at most this many output columns are compiled as multiply-and-sum, so that Inductor
fuses them with their neighbours: [64, 128] x [128, 2] takes 1 to 3 us with them, and 10 to 11 us
alone as a product of MKL. Products with so few inner terms are compiled in the same way."""


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
    compiles the traced function to a shared library inside torch's cache, and the next run with the
    same shapes loads it in milliseconds. A call of it costs 10 us; one of `torch.compile` costs 35
    us and more with as many tensors. On a GPU `torch.compile` compiles the traced function.

    Attributes:
        state: tensors of the state, in the order of `tree.leaves`; compiled functions read them and
            write them in place.
        results: buffers for the results of each function, a tree by name.
    """

    def __init__(self, state: Any) -> None:
        self._tree = state
        self.state = [tensor.detach() for tensor in tree.leaves(state)]
        self._learns = [tensor.requires_grad for tensor in tree.leaves(state)]
        self.results: dict[str, Any] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
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
        jobs: list[Path] = []
        for traced in self._functions:
            graph, constants = self.trace(traced)
            self._graphs.append(graph)
            self._constants.append(constants)
            if self.state[0].device.type != "cpu":
                continue
            example = (*self._example(traced), *constants)
            package = _cache() / f"{traced.name}-{_key(graph, example)}.pt2"
            self._packages.append(package)
            if not package.exists() and package not in jobs:
                self._folder = self._folder or tempfile.TemporaryDirectory()
                source = Path(self._folder.name) / f"{len(jobs) // 2}.pt2"
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    torch.export.save(torch.export.export(graph, example), source)
                jobs += [source, package]
        if jobs:
            command = [
                sys.executable,
                packages.__file__,
                str(torch.get_num_threads()),
                *map(str, jobs),
            ]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )

    def finish(self) -> list[CompiledFn]:
        """Wait for the compiler, and call every function once on copies of its tensors.

        Returns:
            The compiled functions, in the order of `start`.

        Raises:
            EngineUnavailableError: the compiler failed, or a function cannot be loaded or called;
                the state was not written.
        """
        try:
            return self._finish()
        except EngineUnavailableError:
            raise
        except Exception as error:
            raise EngineUnavailableError(f"not usable: {first_line(error)}") from error

    def _finish(self) -> list[CompiledFn]:
        if self._process is not None:
            _, log = self._process.communicate()
            code, self._process = self._process.returncode, None
            self.close()
            if code:
                lines = log.decode(errors="replace").strip().splitlines() or ["no message"]
                raise EngineUnavailableError(f"the compiler failed: {lines[-1][:200]}")
        runs = self._load()
        for traced, run, graph, more in zip(
            self._functions, runs, self._graphs, self._constants, strict=True
        ):
            try:
                self._try(traced, run, graph, more)
            except Exception as error:
                what = f"{traced.name} does not run: {first_line(error)}"
                raise EngineUnavailableError(what) from error
        return [_append(run, more) for run, more in zip(runs, self._constants, strict=True)]

    def _load(self) -> list[CompiledFn]:
        if not self._packages:
            options = inductor_options(torch.__version__)
            compiled = (torch.compile(g, fullgraph=True, options=options) for g in self._graphs)
            return [_take_list(function) for function in compiled]
        runs: list[CompiledFn] = []
        errors: list[Exception] = []
        for package in self._packages:
            try:
                runs.append(_load(package))
            except Exception as error:
                errors.append(error)
                with contextlib.suppress(OSError):  # or every later run would load it again
                    package.unlink()
        if errors:
            what = f"not loadable: {first_line(errors[0])}"
            raise EngineUnavailableError(what) from errors[0]
        return runs

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
        """Stop the compiler if it runs, and remove its input files."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


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


def _cache() -> Path:
    """Folder of compiled functions, inside torch's own cache (TORCHINDUCTOR_CACHE_DIR)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir()) / "dqn_fast"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(graph: torch.fx.GraphModule, example: Sequence[Tensor]) -> str:
    """Hash of everything that the compiled function depends on."""
    digest = hashlib.sha256()
    flags = ""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    layout = [(str(t.dtype), tuple(t.shape), t.stride()) for t in example]
    settings = (torch.get_num_threads(), torch.get_float32_matmul_precision())
    parts = (graph.code, layout, torch.__version__, *settings, flags)
    for part in (*parts, platform.machine(), packages.PRODUCT.read_text()):
        digest.update(repr(part).encode())
    return digest.hexdigest()[:32]


def _load(package: Path) -> CompiledFn:
    """The function in a compiled package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run: CompiledFn = torch._inductor.aoti_load_package(str(package)).loader.boxed_run
    return run


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
