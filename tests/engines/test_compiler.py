"""Functions that are traced and compiled: whole, with nothing baked in, and kept."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.fx.experimental.proxy_tensor import make_fx

from dqn_fast import tree
from dqn_fast.algorithm import StepInputs, UpdateInputs
from dqn_fast.engines import StopRequested, cache, compiler
from dqn_fast.engines.cache import WorkFolder, write_whole
from dqn_fast.engines.compiler import Compiler, Traced, inductor_options
from dqn_fast.setup import setup
from dqn_fast.train import Args
from tests.engines.runs import CASES, assert_equal, copy_of, descendants, started, wait_until

# Its process compiles what the tests of runs need while these trace.
pytestmark = pytest.mark.usefixtures("compiling")

# ------------------------------------------------------------------------------------- tracing


@pytest.mark.parametrize("env_id", ["LineWorld-v0", "CartPole-v1", "FrozenLake-v1"])
def test_a_vector_step_traces_whole_and_bakes_nothing_in(env_id):
    """The traced function gives what the plain one gives, and every scheduled number is an input:
    each of them changed changes the result alike (trap 11). Tracing itself writes nothing
    (trap 12), and the constants of a function are neither carried nor written."""
    args = Args.for_env(env_id, num_envs=16, hidden_sizes=(8,), batch_size=8, eps_repeat=0.0)
    args = replace(args, train_freq=16, gradient_steps=1, learning_starts=64, buffer_size=200)
    training = setup(replace(args, device="cpu", engine="eager"))
    dqn, state = training.dqn, training.state
    for chunk, steps, updates in training.inputs():
        if chunk.num_updates:
            break
        training.runner(steps, updates, chunk.update_counts)
    step = StepInputs(*(t[0] for t in steps))
    update = UpdateInputs(*(t[0] for t in tree.leaves(updates)))._replace(sync=torch.tensor([0.5]))
    before = copy_of(state)
    traces = Compiler(state)
    graph, constants = traces.trace(Traced("step", dqn.vector_step_, (step, [update])))
    results = traces.results["step"]
    assert_equal(before, state)
    addresses = {tensor.data_ptr() for tensor in tree.leaves(state)}
    assert not addresses & {constant.data_ptr() for constant in constants}
    constants_before = [constant.clone() for constant in constants]

    baseline, settings = None, ("step_size", "inverse_correction", "sync", "gamma", "norm")
    for change in ("nothing", "epsilon", *settings):
        ours, theirs = copy_of(state), copy_of(state)
        new_step, new_update = step, update
        if change == "epsilon":
            new_step = step._replace(epsilon=1.0 - step.epsilon.round())
        elif change in UpdateInputs._fields:
            new_update = update._replace(**{change: getattr(update, change) * 0.5 + 0.1})
        for one in (ours, theirs):
            if change == "gamma":
                one.hyper.gamma.fill_(0.3)
            elif change == "norm":
                one.hyper.max_grad_norm.fill_(1e-4)
        record = dqn.vector_step_(ours, new_step, [new_update])
        with torch.no_grad():
            inputs = tree.leaves((new_step, new_update, results))
            graph(*(t.detach() for t in tree.leaves(theirs)), *inputs, *constants)
        ours, theirs = ([t.detach() for t in tree.leaves(one)] for one in (ours, theirs))
        plain, traced = [*tree.leaves(record), *ours], [*tree.leaves(results), *theirs]
        for a, b in zip(plain, traced, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        baseline = baseline or plain
        same = [torch.equal(a, b) for a, b in zip(plain, baseline, strict=True)]
        same = same[: -len(state.hyper)]  # the last tensors are the settings themselves
        assert all(same) == (change == "nothing"), change
    assert_equal(constants_before, constants)


@pytest.mark.parametrize("env_id", ["LineWorld-v0", "FrozenLake-v1"])
def test_examples_have_the_shapes_of_the_real_inputs(env_id):
    """What is compiled for is what comes: shapes, dtypes and strides."""
    args = Args.for_env(env_id, num_seeds=3, num_envs=1, total_timesteps=600, batch_size=8)
    training = setup(replace(args, device="cpu", engine="eager"))
    chunks = training.inputs()
    steps, updates = next(inputs for chunk, *inputs in chunks if chunk.num_updates)
    examples = tree.leaves(training.dqn.example_inputs(torch.device("cpu")))
    for example, tensor in zip(examples, tree.leaves((steps, updates)), strict=True):
        assert example.dtype == tensor.dtype
        assert example.shape == tensor[0].shape
        assert tensor[0].is_contiguous()


# ------------------------------------------------------------------------- indices have 32 bits

SHAPES_ONLY = (
    "view", "squeeze", "expand", "slice", "select", "clone", "convert_element_type", "_to_copy",
    "alias", "permute", "transpose", "detach", "broadcast", "copy",
)  # fmt: skip


def find_numbers_in_arithmetic(graph: torch.fx.GraphModule, constants: list[Tensor]) -> list[str]:
    """Operations that calculate in 64-bit integers with an `arange` made in the same graph.

    Inductor makes of it the index of a GPU's kernel, which has 32 bits whatever the dtype says; so
    such a result is wrong beyond 2**31 (trap 19). Comparisons and floats are no matter.
    """
    table = {**select_decomp_table()}
    lifted = iter(constants)
    values = [node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"]
    with values[0].fake_mode as mode:
        inputs = [mode.from_tensor(next(lifted)) if v is None else v for v in values]
        lowered = make_fx(graph, table)(*inputs)
    found: list[str] = []
    for traced in (graph, lowered):
        indices: set[torch.fx.Node] = set()
        for node in traced.graph.nodes:
            name = str(node.target)
            value = node.meta.get("val")
            if name.startswith(("aten.arange", "prims.iota")):
                indices.add(node)
            elif indices.intersection(node.all_input_nodes) and isinstance(value, Tensor):
                if value.dtype != torch.int64 or "index" in name or "gather" in name:
                    continue
                indices.add(node)
                if not any(word in name for word in SHAPES_ONLY):
                    found.append(f"{name} in {node.stack_trace or node}")
    return found


# The others trace the same lines for other shapes.
DIFFERENT = ("members", "several updates a step", "held", "table", "host")


@pytest.mark.parametrize(
    "case", [c if c in DIFFERENT else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_no_index_of_a_kernel_takes_part_in_64_bit_arithmetic(case, monkeypatch):
    """In the traced graphs of every kind of run: noise, vector step, gradient step."""
    functions: list[Traced] = []
    compilers: list[Compiler] = []

    def start(self: Compiler, given: list[Traced]) -> None:
        functions.extend(given)
        compilers.append(self)
        for traced in given:
            self.results[traced.name] = self._find_results(traced)

    monkeypatch.setattr(Compiler, "start", start)
    monkeypatch.setattr(Compiler, "finish", lambda self: [])
    setup(replace(CASES[case], engine="compile")).close()
    assert functions[-1].name == "draw"
    monkeypatch.setattr(compiler, "_decompositions", lambda device: {})  # as on a GPU
    for traced in functions:
        assert find_numbers_in_arithmetic(*compilers[0].trace(traced)) == []


def test_numbers_in_arithmetic_are_found():
    """Through views, and in what Inductor makes of an operation; not in comparisons."""

    def function(x: Tensor) -> list[Tensor]:
        number = torch.arange(4)[:, None].expand(4, 2)
        return [(number == 2).long() + x, number.float(), x[number[:, 0]] * 2**40]

    def wrong(x: Tensor) -> list[Tensor]:
        return [torch.arange(4) * 0xD2511F53]

    for each, expected in ((function, 0), (wrong, 2)):
        x = torch.ones(4, 2, dtype=torch.int64)
        traced = Compiler(x).trace(Traced("each", each, ()))
        assert len(find_numbers_in_arithmetic(*traced)) == expected


# ------------------------------------------------------------------------------ what is compiled


def double_and_add_(x: Tensor, y: Tensor) -> Tensor:
    return x.mul_(2).add_(y).clone()


def test_every_function_is_compiled_once():
    """And one that two runs share is compiled for the first of them."""
    x = torch.ones(3)
    functions = [Traced(name, double_and_add_, (torch.ones(3),)) for name in ("one", "other")]
    several = Compiler(x)
    several.start(functions)
    assert several._process is not None
    jobs = [word for word in several._process.args if word.endswith((".pt2", ".package"))]
    several.close()
    assert len(jobs) == len(set(jobs)) == 4


def start(*names: str, state: Tensor | None = None) -> Compiler:
    """A compiler that is at work on a function of each name, all the same."""
    state = torch.ones(3) if state is None else state
    compiler = Compiler(state)
    compiler.start([Traced(name, double_and_add_, (torch.ones_like(state),)) for name in names])
    return compiler


def packages_of(*names: str) -> list[Path]:
    """Where the packages of these functions belong."""
    compiler = start(*names)
    compiler.close()
    return compiler._packages


def store(content: bytes, package: Path) -> None:
    write_whole(content, package, package.parent)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dqn_fast"


def test_damaged_packages_are_made_again(own_cache):
    """In the same run, whatever is wrong with them, and the notes say so; the others stay."""
    names = ("flipped", "cut", "empty", "no package", "linked", "folder")
    packages = dict(zip(names, packages_of(*names), strict=True))
    store(b"not a package", packages["no package"])
    whole = packages["no package"].read_bytes()
    packages["flipped"].write_bytes(bytes([whole[0] ^ 4]) + whole[1:])
    packages["cut"].write_bytes(whole[:-1])
    packages["empty"].write_bytes(b"")
    packages["linked"].symlink_to(own_cache / "elsewhere")
    packages["folder"].mkdir()
    again = start(*names)
    assert again._process is not None
    jobs = again._process.args
    assert not again._loaded
    for name, package in packages.items():
        assert str(package) in jobs
        assert not os.path.lexists(package)
        (note,) = [note for note in again.notes if str(package) in note]
        wrong = {"linked": "is a symbolic link", "folder": "is not a file"}
        wrong["no package"] = "cannot be loaded"
        assert note == f"{package} {wrong.get(name, 'is damaged')}, so it is made again"
    again.close()


PLANT = """
#include <fstream>
__attribute__((constructor)) static void run() {{ std::ofstream("{}") << "it ran"; }}
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("whose", ["ours", "the file is another's", "the folder is another's"])
def test_libraries_of_other_users_are_never_loaded(whose, own_cache, tmp_path, monkeypatch):
    """A real one, with the right digest, that another user put where a run would look for it; the
    first case shows that it does run when it is ours."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache._temporary_cache.cache_clear()
    (package,) = packages_of("one")
    (tmp_path / "plant.cpp").write_text(PLANT.format(tmp_path / "ran"))
    library = tmp_path / "plant.so"
    command = ["g++", "-shared", "-fPIC", str(tmp_path / "plant.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(tmp_path / "plant.zip", "w") as archive:
        archive.write(library, "model/plant.so")
    store((tmp_path / "plant.zip").read_bytes(), package)
    if whose != "ours":
        os.chown(package, 12_345, 12_345)
    if "folder" in whose:
        os.chown(own_cache, 12_345, 12_345)
    try:
        compiler = start("one")
        assert compiler._process is not None
        compiler.close()
        assert (tmp_path / "ran").exists() == (whose == "ours")
        assert len(compiler.notes) == 1
        assert package.exists() == ("folder" in whose)
    finally:
        cache._temporary_cache.cache_clear()


def test_torch_keeps_what_it_compiles_here_in_our_cache(own_cache, monkeypatch):
    """On a GPU, and unless the user named a folder: its default is one in /tmp that it never
    checks. Its first use writes the default into the environment."""
    folder, _ = cache.usable_cache()
    for value in (None, default_cache_dir(), str(folder / "torch")):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if value:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", value)
        compiler._keep_torchs_cache_in(folder)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "torch")
    assert (folder / "torch").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/asked/for")
    compiler._keep_torchs_cache_in(folder)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/asked/for"


def test_the_state_is_not_written_to_the_disk(own_cache):
    """A replay may have gigabytes; the second process gets shapes."""
    compiler = start("one", state=torch.ones(3_000_000))
    size = sum(path.stat().st_size for path in compiler._work.path.glob("*.pt2"))
    compiler.close()
    assert 0 < size < 100_000


# ------------------------------------------------------------------------ the compiler's process

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")


@on_linux
def test_waiting_ends_when_it_is_asked_to(own_cache):
    """At once, with all processes and files of the compiler, which had worked on although the
    thread that started it had ended."""
    with ThreadPoolExecutor(1) as pool:
        compiler = pool.submit(start, "one").result()
    process = compiler._process
    wait_until(lambda: descendants(process.pid))
    time.sleep(0.5)
    assert process.poll() is None
    family = [process.pid, *descendants(process.pid)]
    assert len(family) >= 2
    began = time.monotonic()
    asked: list[float] = []

    def should_stop() -> bool:
        asked.append(time.monotonic())
        return len(asked) > 3

    with pytest.raises(StopRequested):
        compiler.finish(should_stop)
    assert median(b - a for a, b in pairwise([began, *asked])) < 0.5
    assert not any(map(name_of, family))
    assert list(own_cache.glob("work-*")) == []
    assert list(own_cache.glob("*.package")) == []  # it was not waited for


KILLED = """
import time, torch
from tests.engines.test_compiler import start
compiler = start("one")
print("begun", flush=True)
time.sleep(600)
"""


@on_linux
@pytest.mark.parametrize(
    "moment", ["at once", pytest.param("in the C++ compiler", marks=pytest.mark.slow)]
)
def test_a_killed_run_leaves_no_compiler(moment, own_cache):
    """After SIGKILL all processes that it started are ended before they have compiled anything; its
    files are gone too, and those that are not go when the next compiler starts."""
    with started([sys.executable, "-c", KILLED]) as run:
        run.stdout.readline()
        if moment == "at once":
            wait_until(lambda: len(descendants(run.pid)) >= 2)
        else:
            wait_until(lambda: "cc1plus" in map(name_of, descendants(run.pid)))
        family = descendants(run.pid)
        assert len(list(own_cache.glob("work-*"))) == 1
        run.kill()
        run.wait()
        wait_until(lambda: not any(map(name_of, family)), 20)
    wait_until(lambda: not list(own_cache.glob("work-*")), 20)
    assert list(own_cache.glob("*.package")) == []
    left = WorkFolder(own_cache)
    os.close(left.lock)  # as if its process had been killed with the one that watches
    start("one").close()
    assert list(own_cache.glob("work-*")) == []


def name_of(pid: int) -> str:
    """Of a process that runs; empty for one that does not."""
    try:
        name, _, status = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if status.split()[0] == "Z" else name


def run_all(compiler: Compiler) -> list[list[float]]:
    """Values of the state after each call of the compiled functions, and of the last result."""
    rows = []
    for name, call in zip(compiler.results, compiler.finish(), strict=True):
        call([*compiler.state, torch.ones(3), compiler.results[name]])
        rows.append(compiler.state[0].tolist())
    return [*rows, compiler.results[name].tolist()]


EXPECTED = [[3.0] * 3, [7.0] * 3, [7.0] * 3]


@pytest.mark.slow
def test_what_was_damaged_is_compiled_and_kept_again(own_cache):
    """After any flip of a byte the same run calls a compiled function, and the next run needs no
    compiler; precompiled headers are checked too."""
    assert run_all(start("one", "other")) == EXPECTED
    kept = start("one", "other")
    assert kept._process is None
    assert kept.notes == []
    assert run_all(kept) == EXPECTED
    package = kept._packages[0]
    whole = package.read_bytes()
    generator = torch.Generator().manual_seed(1)
    for place in torch.randint(len(whole), (20,), generator=generator).tolist():
        package.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        damaged = start("one", "other")
        damaged.close()
        assert damaged._process is None
        assert set(damaged._loaded) == {kept._packages[1]}
    headers = sorted((own_cache / "inductor").glob("*.gch"))
    assert headers
    for header in headers:
        content = header.read_bytes()
        header.write_bytes(content[:1_000] + bytes([content[1_000] ^ 1]) + content[1_001:])
    assert run_all(start("one", "other")) == EXPECTED
    for header in (own_cache / "inductor").iterdir():
        assert header.name.startswith(hashlib.sha256(header.read_bytes()).hexdigest())
    last = start("one", "other")
    last.close()
    assert len(last._loaded) == 2


TOGETHER = """
import torch
from tests.engines.test_compiler import EXPECTED, run_all, start
for _ in range(2):
    compiler = start("one", "other")
    assert run_all(compiler) == EXPECTED and compiler.notes == [], compiler.notes
"""


@pytest.mark.slow
def test_runs_that_compile_the_same_at_once(own_cache):
    """Four on one cache: all have compiled functions, and none meets a half-written file."""
    runs = [subprocess.Popen([sys.executable, "-c", TOGETHER]) for _ in range(4)]
    assert [run.wait() for run in runs] == [0] * 4
    assert len(list(own_cache.glob("*.package"))) == 2
    assert list(own_cache.glob("work-*")) == []


@pytest.mark.parametrize(
    ("version", "needed"),
    [("2.11.0+cu130", True), ("2.12.1", True), ("2.13.0+cpu", False), ("3.0.0a0", False)],
)
def test_options_are_those_that_a_version_needs(version, needed):
    """Of our own compilations only; torch's settings stay as they are."""
    assert bool(inductor_options(version)) == needed
    assert all(hasattr(torch._inductor.config, name) for name in inductor_options(version))
