"""Sizes without bound from the command line: one line within seconds, whatever the number."""

from __future__ import annotations

import time

import pytest

from dqn_fast import memory
from tests.test_cli import run_main

LARGE = {
    "--num-seeds 1000000000": "--num-seeds 1000000000: must be at most",
    "--num-envs 1000000000000": "--buffer-size 25000: must be at least --num-envs 1000000000000",
    "--num-envs 1000000000000 --buffer-size 1000000000000": "must all be smaller to fit",
    "--eval-episodes 2147483647": "--eval-episodes 2147483647: must be at most",
    "--buffer-size 2147483647": "--buffer-size 2147483647: must be at most",
    "--buffer-size 9223372036854775808": "--buffer-size 9223372036854775808: must be at most 2**53",
    "--hidden-sizes 1000000000": "--hidden-sizes (1000000000,): must be at most",
    "--hidden-sizes 9223372036854775808": "must be at most 2**53",
    "--gradient-steps 1000000000000": "--gradient-steps 1000000000000: must be at most",
    "--batch-size 1000000000 --buffer-size 1000000000 --total-timesteps 1000000000":
        "must all be smaller to fit",
    "--sweep gamma 0.5 0.9 --sweep-random 1000000000": "--sweep with 1000000000 settings: must be",
    "--sweep gamma {many} tau {many} eps_end {many}": "--sweep with 8000000000 settings: must be",
    "--total-timesteps 9223372036854775808": "must be at most 2**53 (9,007,199,254,740,992)",
    "--chunk-steps 1e300": "must be at most 2**53",
    "--learning-starts 1e19": "must be at most 2**53",
    "--log-interval 18446744073709551616": "--log-interval 18446744073709551616: must be at most",
    "--seed 1180591620717411303424": "--seed 1180591620717411303424: must be at most 2**53",
    "--num-threads 2147483648": "--num-threads 2147483648: must be in [0, 1024]",
    "--env-params n_states 10000000000": "--env-params n_states 10000000000: must be at most",
    "--env-params max_steps 9223372036854775808": "--env-params max_steps 9223372036854775808: m",
    "--env-params max_steps 2147483647": "--env-params max_steps 2147483647: must be at most 10,0",
    "--env-id CartPole-v1 --env-params max_steps 1e300": "--env-params max_steps 1000",
    "--env-id FrozenLake-v1 --env-params max_steps 9e18": "--env-params max_steps 9000000000",
    "--env-id gym:CartPole-v1 --env-params max_episode_steps 9223372036854775808":
        "--env-params max_episode_steps 9223372036854775808: must be at most",
    "--env-id gym:CartPole-v1 --eval-episodes 10000000 --eval-envs 9000000":
        "--eval-envs 9000000: must be at most",
    "--env-id gym:CartPole-v1 --vectorization-mode async --num-envs 10000": "--num-envs 10000: m",
    "--name {long}": "...: must be at most 255 characters, all printable",
    "--wandb-project {long}": "--wandb-project aaaa",
    "--wandb-tags ok {long}": "--wandb-tags ('ok', 'aaaa",
    "--env-id {long}": "--env-id aaaa",
    "--run-dir {long}": "at most 255 bytes in a name and 3,500 in all",
    "--run-dir {deep}": "at most 255 bytes in a name and 3,500 in all",
    "--device {long}": "--device aaaa",
}  # fmt: skip
"""Command line, and a part of the line that it gets."""


@pytest.mark.parametrize("arguments", LARGE)
def test_a_size_without_bound_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    """Exit status 2 within seconds of work; the flag, its value and what is allowed; no file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**9)
    many = " ".join(f"0.{i:04d}" for i in range(1, 2_001))
    words = arguments.format(many=many, long="a" * 300, deep="a/" * 2_000).split()
    began = time.process_time()
    assert run_main(monkeypatch, *words) == 2
    assert time.process_time() - began < 10.0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: --")
    assert LARGE[arguments] in err
    assert len(err.splitlines()) == 1
    assert len(err) < 1_100
    assert not list(tmp_path.iterdir())
