"""The README holds: its example runs, its flags exist, its commands are those that CI runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np

from dqn_fast.agent import load_agent
from dqn_fast.train import Args

README = (Path(__file__).parent.parent / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_example_environment_trains(tmp_path, monkeypatch, capsys):
    """The environment of one's own is 25 lines, passes check_env and is learned by its example."""
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in code_blocks("python") if "check_env" in block)
    body = example[example.index("class State") : example.index("check_env(Drift())")]
    assert len([line for line in body.splitlines() if line.strip()]) <= 25
    names: dict[str, object] = {"__name__": "builtins"}
    exec(compile(example, "README.md", "exec", dont_inherit=True), names)
    (run_dir,) = (tmp_path / "runs").iterdir()
    agent = load_agent(run_dir, env=names["Drift"](), device="cpu")  # type: ignore[operator]
    assert agent.act(np.array([[-1.0], [1.0]], np.float32)).tolist() == [2, 0]
    assert "done: 20,032 transitions" in capsys.readouterr().out


def test_the_other_examples_run(tmp_path, monkeypatch):
    """Training from Python, loading what it saved, Gymnasium in and out."""
    monkeypatch.chdir(tmp_path)
    load, run, *others = (block for block in code_blocks("python") if "check_env" not in block)
    exec(run, {})
    (run_dir,) = (tmp_path / "runs").iterdir()
    exec(re.sub(r'"runs/.*?"', f'"{run_dir}"', load), {})
    for block in others:
        exec(block, {})


def test_every_flag_exists():
    """No flag of the training command that the README names is made up."""
    fields = {field.name for field in dataclasses.fields(Args)}
    text = README
    others = (
        "--episodes", "--entity", "--video", "--dist", "--env my_module", "--json", "--engines",
    )  # fmt: skip
    for other in others:  # of other commands
        text = text.replace(other, "")
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]*)", text)}
    assert flags - fields - {"help"} == set()


def test_the_two_commands_stand_alone():
    """One trains and one tests; each is a block of its own."""
    assert code_blocks("sh") == [
        "pip install -e . && python -m dqn_fast.train --num-envs 64\n",
        'pip install -e ".[test]" && pytest -n 2 --dist loadfile\n',
    ]


def test_the_notebooks_settings_are_complete():
    """Following the README's flags gives the notebook's hyperparameters."""
    from benchmarks.reference import ReferenceConfig

    flags = re.search(r"The notebook's own: `(.*?)`", README, re.DOTALL).group(1).split()
    given = {
        name.removeprefix("--").replace("-", "_"): None if value == "None" else float(value)
        for name, value in zip(flags[::2], flags[1::2], strict=True)
    }
    args, reference = vars(Args()) | given, ReferenceConfig()
    for name, value in vars(reference).items():
        if name in args and name not in ("seed", "log_interval"):
            assert args[name] == value, name
    assert args["learning_rate_end"] is None
