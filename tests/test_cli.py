"""The command line: bad input, signals, full disks, and what a person sees."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dqn_fast import train as train_module
from dqn_fast.agent import load_agent
from dqn_fast.envs import EXPERIMENTS, TENSOR_ENVS, experiment, make_env
from tests.engines.runs import wait_until

TRAIN = [sys.executable, "-m", "dqn_fast.train"]


def run_main(monkeypatch, *arguments: str) -> int:
    """`python -m dqn_fast.train` in this process."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    return train_module.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--env-id Nope-v3",
            "--env-id Nope-v3: unknown environment; known are Acrobot-v1, CartPole-v1",
        ),
        ("--num-envs 0", "--num-envs 0: must be at least 1"),
        ("--num-seeds -1", "--num-seeds -1: must be at least 1"),
        ("--total-timesteps 0", "--total-timesteps 0: must be at least 1"),
        ("--seed -5", "--seed -5: must be at least 0"),
        ("--batch-size 30000", "--batch-size 30000: must be at most 25000, the most that replay"),
        ("--batch-size 512 --total-timesteps 100", "--batch-size 512: must be at most 128"),
        ("--buffer-size 32", "--buffer-size 32: must be at least --num-envs 64"),
        ("--log-interval -1", "--log-interval -1: must be at least 0 (0: off)"),
        ("--eval-interval -100", "--eval-interval -100: must be at least 0 (0: off)"),
        ("--checkpoint-interval -1", "--checkpoint-interval -1: must be at least 0 (0: off)"),
        ("--target-update-interval -1", "--target-update-interval -1: must be at least 0"),
        ("--train-freq 0", "--train-freq 0: must be at least 1"),
        ("--eps-start 1.5", "--eps-start 1.5: must be in [0, 1]"),
        ("--eps-end -0.1", "--eps-end -0.1: must be in [0, 1]"),
        ("--eps-fraction nan", "--eps-fraction nan: must be in [0, 1]"),
        ("--tau 0", "--tau 0.0: must be in (0, 1]"),
        ("--tau 1.01", "--tau 1.01: must be in (0, 1]"),
        ("--gamma 1.1", "--gamma 1.1: must be in [0, 1]"),
        ("--learning-rate 0", "--learning-rate 0.0: must be above 0 and finite"),
        ("--learning-rate inf", "--learning-rate inf: must be above 0 and finite"),
        ("--learning-rate-end -1", "--learning-rate-end -1.0: must be at least 0 and finite"),
        ("--max-grad-norm 0", "--max-grad-norm 0.0: must be above 0"),
        ("--hidden-sizes 64 0", "--hidden-sizes (64, 0): must be at least 1 each"),
        ("--hidden_sizes=[64,0]", "--hidden-sizes (64, 0): must be at least 1 each"),
        ("--double_q=maybe", "--double-q maybe: must be true or false"),
        ("--stop-at-return inf", "--stop-at-return inf: must be finite"),
        ("--env-params slip_prob 1.5", "--env-params slip_prob 1.5: must be in [0, 1]"),
        ("--env-params colour red", "--env-params colour red: LineWorld-v0 has no such parameter"),
        ("--env-params n_states many", "--env-params n_states many: must be of type int"),
        ("--device cuda:99", "--device cuda:99: not available here; there is auto, cpu"),
        ("--device quantum", "--device quantum: not available here; there is auto, cpu"),
        ("--buffer-size 10000000000000", "--buffer-size 10000000000000: must be at most "),
        (f"--buffer-size {10**22}", f"--buffer-size {10**22}: must be at most "),
        ("--num-seeds 1000000000", "--num-seeds 1000000000: must be at most "),
        (
            "--eval-interval 0 --stop-at-return 1",
            "--eval-interval 0: must be above 0 with --stop-at-return",
        ),
        (
            "--eval-interval 0 --stop-when-optimal",
            "--eval-interval 0: must be above 0 with --stop-at-return or --stop-when-optimal",
        ),
        ("--name a/b", "--name a/b: must be a name without /"),
        ("--run-dir {tmp}/full", "full: is not empty; it must be new or empty"),
        ("--run-dir {tmp}/full/file", "file: is a file; it must be a directory"),
        ("--run-dir {tmp}/full/file/below", "below: cannot be written (Not a directory)"),
        ("--run-dir /proc/nowhere/run", "--run-dir /proc/nowhere/run: cannot be written"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, tmp_path, monkeypatch, capsys):
    """Exit status 2, one line on stderr, nothing on stdout, nothing written or overwritten."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert run_main(monkeypatch, *arguments.format(tmp=tmp_path).split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*"))] == [
        Path("full"),
        Path("full/file"),
    ]
    assert (tmp_path / "full" / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        "--num-envs many", "--num_envs=1.5", "--no-such-flag 3", "--loss cubic", "--double-q maybe",
        "--hidden_sizes=[wide]",
    ],
)  # fmt: skip
def test_flags_that_do_not_parse_show_tyros_message(arguments, tmp_path, monkeypatch, capsys):
    """Exit status 2 as well, and nothing written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, *arguments.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_documents_every_flag(monkeypatch, capsys):
    """Each field of Args is shown with its documentation."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--help")
    text = capsys.readouterr().out
    for name in vars(train_module.Args()):
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    "flag", ["--env-id CartPole-v1", "--env-id=gym:CartPole-v1", "--env_id CartPole-v1"]
)
def test_defaults_follow_the_environment(flag, monkeypatch, capsys):
    """What --help shows, and what `Args.for_env` gives, is the environment's own table."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *flag.split(), "--help")
    text = capsys.readouterr().out
    table = dict(experiment("CartPole-v1"))
    assert len(table) > 5
    args = train_module.Args.for_env("CartPole-v1", seed=3)
    assert args.seed == 3
    for name, value in table.items():
        assert getattr(args, name) == value
        if not isinstance(value, bool):
            about = text.split(f"--{name.replace('_', '-')} ")[1].split("│ --")[0]
            assert f"(default: {value})" in about


def test_settings_beside_an_environment_are_settings():
    """Every name in every table is a field of Args, or a parameter of the environment."""
    fields = vars(train_module.Args())
    for env_id in (*TENSOR_ENVS, *EXPERIMENTS):
        table = experiment(env_id)
        assert set(table) <= set(fields), env_id
        assert make_env(env_id).params.items() >= dict(table.get("env_params", {})).items()


def test_a_run_from_the_command_line(tmp_path):
    """Header with device, engine, replay ratio, rounded values, sizes; summary; exit status 0."""
    run_dir = tmp_path / "run"
    done = subprocess.run(
        [*TRAIN, "--num-envs", "60", "--total-timesteps", "3000", "--run-dir", str(run_dir),
         "--env-params", "n_states", "7", "slip_prob", "0.1"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    for text in (
        "LineWorld-v0 (n_states=7, max_steps=40, step_penalty=-0.01, goal_reward=1.0, slip_prob=",
        "engine eager (",
        "replay ratio 4",
        "learning_starts 500 -> 540",
        "17,794 parameters",
        "25,000 x 8 bytes",
        "done: 3,000 transitions and 157 gradient steps",
        f"results in {run_dir}",
    ):
        assert text in done.stdout
    assert "%|" not in done.stdout  # no progress bar where stdout is no terminal


def test_a_run_with_flags_as_a_sweep_writes_them(tmp_path):
    """`wandb agent` gives --name=value with _, and truth values and lists as Python writes them."""
    run_dir = tmp_path / "run"
    flags = ["--learning_rate=0.001", "--double_q=True", "--hidden_sizes=[32, 32]", "--quiet=true",
             "--report=False", "--wandb_tags=['a', 'b']", "--total_timesteps=1e3",
             "--learning_rate_end=None", f"--run_dir={run_dir}"]  # fmt: skip
    done = subprocess.run([*TRAIN, *flags], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
    args = json.loads((run_dir / "config.json").read_text())["args"]
    assert args["learning_rate"] == 0.001
    assert args["learning_rate_end"] is None
    assert args["double_q"] is True
    assert args["hidden_sizes"] == [32, 32]
    assert args["wandb_tags"] == ["a", "b"]
    assert args["total_timesteps"] == 1_000
    assert not (run_dir / "report.html").exists()


def test_quiet_prints_nothing(tmp_path):
    """Not even the header."""
    command = [*TRAIN, "--quiet", "--total-timesteps", "1000", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_well(number, status, tmp_path):
    """Exit status 130 or 143 with everything saved, the agent too."""
    run_dir = tmp_path / "run"
    command = [*TRAIN, "--total-timesteps", "100000000", "--run-dir", str(run_dir)]
    command += ["--eval-interval", "4096"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: (run_dir / "best.pt").exists() or process.poll() is not None)
        assert process.poll() is None
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    name = signal.Signals(number).name
    assert stderr == f"{name}: saving, then ending; a second SIGINT ends at once\n"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert "stopped" in (run_dir / "report.html").read_text()
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["global_step"] <= summary["global_step"]  # it may stop in an evaluation
    for which in ("best", "last"):
        assert load_agent(run_dir, which, device="cpu").act(0) in (0, 1)


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
from dqn_fast.train import main
sys.exit(main())
"""


def test_a_file_that_cannot_grow_costs_a_warning_not_the_run(tmp_path):
    """Files limited to 3 kB: one warning for each that fails, training goes on to its end, and the
    exit status and one line say what is missing."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", LIMITED, "3000", "--run-dir", str(run_dir)]
    done = subprocess.run(
        [*command, "--total-timesteps", "20000"], capture_output=True, text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    for name in ("checkpoint.pt", "best.pt", "episodes.npz", "metrics.jsonl"):
        assert name in error
    assert "done: 20,032 transitions" in done.stdout
    output = done.stdout + done.stderr
    for name in ("checkpoint.pt", "best.pt", "episodes.npz"):
        assert output.count(f"{name} could not be written") == 1
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "done"
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["global_step"] > 0
    assert [path.name for path in run_dir.glob(".*")] == [".lock"]
