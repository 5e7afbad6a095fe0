"""The generated program can be read: names, source lines; it is kept; its parts can be counted."""

from __future__ import annotations

import ctypes
import re
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dqn_fast
from dqn_fast.engines.fused import FusedChunk
from dqn_fast.engines.fused.build import Build, key_of, load
from dqn_fast.engines.fused.cpp import print_program
from dqn_fast.engines.fused.lower import lower
from dqn_fast.engines.fused.planner import Program, plan
from dqn_fast.engines.fused.trace import trace
from dqn_fast.resume import MAY_CHANGE
from dqn_fast.setup import setup
from dqn_fast.train import Args, main, train

PACKAGE = Path(dqn_fast.__file__).parent
FUSED = Args(
    engine="fused", device="cpu", hidden_sizes=(8,), total_timesteps=1_024, learning_starts=64,
    eval_episodes=2, report=False, quiet=True,
)  # fmt: skip


def source_of(args: Args) -> str:
    """The program for a run."""
    with closing(setup(replace(args, engine="eager"))) as training:
        parts = training.dqn, training.state, training.plan, training.noise
        with closing(FusedChunk(*parts)) as fused:
            return fused.source


@pytest.fixture(scope="module")
def source() -> str:
    return source_of(replace(FUSED, env_id="CartPole-v1"))


def test_arguments_have_names(source):
    """Where they are in the state, in the inputs and in the results, with the shape of one
    member."""
    for text in (
        "float* const a0 = (float*)(a[0]); // params[0] [1, 4, 8]",
        " // adam.square[0] [1, 4, 8]",
        " // inputs.explore [1, 64, 2]",
        " // updates[0].rows [1, 64]",
        " // result.episode_length [64]",
    ):
        assert text in source
    declared = re.findall(r"^  .*\* const [ac]\d+ = .*$", source, re.MULTILINE)
    assert all(" // " in line for line in declared)


def test_names_depend_on_the_shapes_of_one_member_only(source):
    """Neither the number of members nor the length of a run is in the program, and so none of them
    makes the compiler run again."""
    other = replace(FUSED, env_id="CartPole-v1", num_seeds=3, total_timesteps=4_096, seed=5)
    assert source_of(other) == source


def test_loops_are_commented_with_the_lines_of_the_algorithm(source):
    """Each line is one of a file that describes a vector step; a product's calls it by name."""
    origins = re.findall(r"(\w+\.py):(\d+) (\w+)", source)
    files = {path.name: path for path in PACKAGE.rglob("*.py") if "engines" not in path.parts}
    text = {name: path.read_text().splitlines() for name, path in files.items()}
    allowed = {"dqn.py", "networks.py", "heads.py", "replay.py", "noise.py", "core.py"}
    assert {name for name, *_ in origins} <= allowed | {"cartpole.py"}
    assert {"dqn.py", "networks.py", "noise.py", "cartpole.py"} <= {name for name, *_ in origins}
    for name, line, operation in origins:
        assert text[name][int(line) - 1].strip()
        if operation == "baddbmm":
            assert "baddbmm" in text[name][int(line) - 1]


def test_lines_are_indented_and_short(source):
    """By two blanks for each brace that is open; comments have at most 100 characters."""
    functions = re.findall(r"^void \w+\(char\* const\* a, .*?^}$", source, re.MULTILINE | re.DOTALL)
    assert len(functions) == 4
    for line in "\n".join(functions).splitlines():
        if line.strip().startswith("//"):
            assert len(line) <= 100
    for function in functions:
        depth = 0
        for line in function.splitlines():
            code = line.split("//")[0].rstrip()
            blanks = len(line) - len(line.lstrip())
            if code and not code.endswith(");"):  # calls go on in a second line
                assert blanks == 2 * (depth - code.lstrip().startswith("}")), line
            depth += code.count("{") - code.count("}")
        assert depth == 0


# ------------------------------------------------------------------------------- keeping it


def test_the_program_is_kept(tmp_path):
    """As it is compiled, also where the cache has what the compiler made; the reason says where."""
    for name in ("first", "second"):
        args = replace(
            FUSED, keep_generated=tmp_path / name / "deep", run_dir=tmp_path / f"r{name}"
        )
        result = train(args)
        (path,) = (tmp_path / name / "deep").iterdir()
        assert re.fullmatch(r"[0-9a-f]{12}\.cpp", path.name)
        assert result.summary["engine"] == "fused"
        assert result.summary["engine_reason"] == f"asked for; source in {path}"
        assert path.read_text() == source_of(FUSED)


def test_another_engine_says_that_it_generates_nothing(tmp_path):
    """And the folder stays empty."""
    args = replace(FUSED, engine="eager", keep_generated=tmp_path / "kept")
    summary = train(replace(args, run_dir=tmp_path / "run")).summary
    assert summary["engine_reason"] == "asked for; no program is generated that could be kept"
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_refused(name, tmp_path, monkeypatch, capsys):
    """In one line, before anything is written."""
    (tmp_path / "file").touch()
    flags = ["--keep-generated", str(tmp_path / name), "--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --keep-generated {tmp_path / name}: must be a folder that can ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_said(tmp_path):
    """The run goes on without the file."""
    with closing(setup(replace(FUSED, engine="eager"))) as training:
        parts = training.dqn, training.state, training.plan, training.noise
        with closing(FusedChunk(*parts)) as fused:
            said = fused.keep(Path("/dev/full"))
    assert said.startswith("/dev/full/")
    assert "cannot be written: Not a directory" in said


def test_a_resumed_run_may_keep_its_program(tmp_path):
    """It is no setting of what is learned."""
    assert MAY_CHANGE["keep_generated"] == ""
    args = replace(FUSED, run_dir=tmp_path / "run", engine="eager")
    train(args)
    more = Args(resume=tmp_path / "run", total_timesteps=2_048, engine="fused")
    train(replace(more, keep_generated=tmp_path / "kept", quiet=True))
    assert len(list((tmp_path / "kept").iterdir())) == 1


# ------------------------------------------------------------------------------- counting it


def small_program() -> Program:
    """y = x @ x + 1 of [3, 3], in the state."""

    def square(state: list[torch.Tensor]) -> torch.Tensor:
        return torch.mm(state[0], state[0]) + 1

    graph = trace(square, [torch.zeros(3, 3)], ())
    return plan("square", lower(graph.graph, graph.num_arguments))


def test_a_counted_program_counts_every_phase():
    """Each as often as the function runs, with the time between two readings of the clock."""
    program = small_program()
    source = print_program([program, replace(program, name="again")], counted=True)
    count = 2 * len(program.kernels)
    assert [int(n) for n in re.findall(r"^ +PHASE\((\d+)\);", source, re.MULTILINE)] == [
        *range(count)
    ]
    with closing(Build(source, key_of(source), {}, [])) as build:
        library = load(build.finish())
    phases = (ctypes.c_int64 * (2 * count)).in_dll(library, "phases")
    library.ticks.restype = ctypes.c_int64
    x, y = torch.eye(3), torch.zeros(3, 3)
    table = np.array([(t.data_ptr(), 0, 0) for t in (x, y)], np.int64)
    scratch = torch.zeros(2**16, dtype=torch.uint8)

    def address(pointer: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(pointer)

    began = library.ticks()
    steps, members = ctypes.c_int64(5), (ctypes.c_int64(0), ctypes.c_int64(2))
    library.many_square(
        address(table.ctypes.data), None, steps, *members, address(scratch.data_ptr())
    )
    whole = library.ticks() - began
    assert torch.equal(y, torch.eye(3) + 1)
    spent, runs = np.ctypeslib.as_array(phases).reshape(-1, 2).T
    assert runs.tolist() == [10] * (count // 2) + [0] * (count // 2)
    assert 0 < spent.sum() < whole


def test_counting_is_off_unless_asked_for(source):
    """Nothing of it is in the program of a run."""
    assert "ticks" not in source
    assert print_program([small_program()]).count("PHASE(") == len(small_program().kernels) + 1
