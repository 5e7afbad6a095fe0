"""One cache of compiled functions, runs that several tests look at, graphs without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dqn_fast.engines import EngineChoice, choose_engine
from dqn_fast.setup import Training
from dqn_fast.train import train
from tests.engines.runs import SHORT, SMALL, Ran, Rerun, begin, finish, plan_of_short_windows, run


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of compiled functions that begins empty and is shared by the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` draws in windows of one length, so that runs of all lengths share `draw`."""
    monkeypatch.setattr("dqn_fast.setup.make_plan", plan_of_short_windows)


@pytest.fixture(scope="session")
def eager() -> Ran:
    """`SMALL`, run plainly."""
    return run(replace(SMALL, engine="eager"))


@pytest.fixture(scope="session")
def compiling(cache: None) -> Iterator[Training]:
    """`SMALL`, whose compiler works while other tests run."""
    training = begin(replace(SMALL, engine="compile"))
    yield training
    training.close()


@pytest.fixture(scope="session")
def compiled(compiling: Training) -> Ran:
    """`SMALL`, compiled; from then on the cache holds what runs of its shapes need."""
    return finish(compiling)


@pytest.fixture(scope="session")
def eager_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the run that an engine which is not available comes down to."""
    run_dir = tmp_path_factory.mktemp("eager") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dqn_fast.setup.make_plan", plan_of_short_windows)
        train(replace(SHORT, engine="eager", run_dir=run_dir))
    return run_dir


@pytest.fixture
def graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """`--engine graph` captures on the CPU too, by running calls again; with compiled kernels once
    "compiled" is set."""

    def choose(name: Any, device: Any, num_updates: int, on_host: bool = False) -> EngineChoice:
        if name == "graph" and not on_host:
            return EngineChoice("graph", kernels["compiled"], "asked for")
        return choose_engine(name, device, num_updates, on_host)

    kernels = {"compiled": False}
    monkeypatch.setattr("dqn_fast.setup.choose_engine", choose)
    monkeypatch.setattr("dqn_fast.engines.runner.CudaGraphs", Rerun)
    return kernels


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def captured_on(request: pytest.FixtureRequest) -> str:
    """A device on which `--engine graph` captures: through a recorder of the tests, or really."""
    if request.param == "cpu":
        request.getfixturevalue("graphs_on_the_cpu")
    return str(request.param)
