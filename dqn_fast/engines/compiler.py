"""Functions of a state, traced and compiled for exactly the shapes of one run.

Every tensor that lives longer than a call keeps its address, noise and schedules come in as
tensors, and nothing is read on the host. So a function of the state and of its inputs is traced
once, compiled, and never again: there is nothing to guard on.
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
from dqn_fast.engines import packages
from dqn_fast.engines.choice import EngineUnavailableError, first_line

NARROW = 8
"""Columns up to which a matrix product is compiled as multiplications and sums, which fuse with
what stands around them; the routines for matrices take 10 us for [64, 128] x [128, 2], four times
what they take for eight times the work."""


class Traced(NamedTuple):
    """A function to trace and compile.

    Attributes:
        name: for messages and file names.
        function: takes the state and the inputs; returns a tree of tensors.
        inputs: trees of tensors in the shapes of what the function is called with.
        exact: whether compiled it must return the same bits, which the first call then checks.
    """

    name: str
    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    exact: bool = False


CompiledFn = Callable[[list[Tensor]], object]
"""A compiled function: takes the tensors of the state, of the inputs and of the results in one list
that it may empty, and writes the results. So a call makes no tensor that outlives it."""


class Compiler:
    """Compiles functions of one state, in a process beside this one.

    A function is traced with stand-ins for the tensors, so nothing is computed and nothing is
    written. On a CPU the result is a shared library that is kept beside torch's own cache and
    loaded in milliseconds by the next run of the same shapes; a call costs 10 us, where one of
    `torch.compile` costs 35 us and more with this many tensors. On a GPU `torch.compile` is called
    on the traced function.

    Attributes:
        state: tensors of the state, in the order of `tree.leaves`; compiled functions read them and
            write them in place.
        results: of each function by name, a tree in the shapes of what it returns.
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
        """What the function returns for the tensors of the state and of the inputs."""
        given = iter(tensors)
        carried = [
            tensor.detach().requires_grad_() if learns else tensor
            for learns, tensor in zip(self._learns, given, strict=False)
        ]
        return traced.function(
            tree.replace(self._tree, carried), *tree.replace(traced.inputs, given)
        )

    def _find_results(self, traced: Traced) -> Any:
        """Tensors in the shapes of what the function returns; computes and writes nothing."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(t) for t in (*self.state, *tree.leaves(traced.inputs))]
            made = self._call(traced, fake)
        return tree.replace(
            made, [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in tree.leaves(made)]
        )

    def trace(self, traced: Traced) -> tuple[torch.fx.GraphModule, list[Tensor]]:
        """The function as one graph of plain operations, gradients included; a whole graph or an
        error, as with `fullgraph`.

        Returns:
            The graph, a function of the state, the inputs, the results, which it writes, and some
            more tensors; and these: constants of the function, such as an environment's tables.
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
        """Begin to compile; `finish` waits for the end.

        Raises:
            EngineUnavailableError: a function cannot be traced, or the compiler not be started.
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
        return [_with(run, more) for run, more in zip(runs, self._constants, strict=True)]

    def _load(self) -> list[CompiledFn]:
        if not self._packages:
            options = inductor_options(torch.__version__)
            compiled = (torch.compile(g, fullgraph=True, options=options) for g in self._graphs)
            return [_called_with_list(function) for function in compiled]
        runs: list[CompiledFn] = []
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
        self, traced: Traced, run: CompiledFn, graph: Callable[..., Any], constants: list[Tensor]
    ) -> None:
        """Call a compiled function on copies; on a GPU this is what compiles it.

        Raises:
            RuntimeError: an exact function returns other numbers than the plain one.
            Exception: whatever goes wrong.
        """
        ours = [tensor.detach().clone() for tensor in self._example(traced)]
        results = ours[len(ours) - len(tree.leaves(self.results[traced.name])) :]
        torch._foreach_zero_(results)  # they may hold the right numbers already
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Inductor's own, about precision and deprecated names
            run([*ours, *constants])
        if ours[0].device.type == "cuda":  # errors of kernels come late
            torch.cuda.current_stream(ours[0].device).synchronize()
        if traced.exact:  # it writes its results and nothing else
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
            return torch.ops.dqn_fast.product(x, y) if packages.own_product(x) else NotImplemented
        if x.stride(-1) == 1:  # sums along what lies together in memory
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
    """Digest of everything that the compiled function depends on."""
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


def _with(run: CompiledFn, constants: list[Tensor]) -> CompiledFn:
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


def _called_with_list(function: Callable[..., Any]) -> CompiledFn:
    def run(tensors: list[Tensor]) -> None:
        with torch.no_grad():
            function(*tensors)

    return run
