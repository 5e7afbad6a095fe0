"""Files that are whole or not there, and the best agent of a run."""

from __future__ import annotations

import json
import math
import stat
from dataclasses import replace

import pytest
import torch

from dqn_fast.dqn import QFunction
from dqn_fast.heads import ScalarHead
from dqn_fast.networks import QNetwork
from dqn_fast.noise import Noise
from dqn_fast.record.checkpoint import BestAgent, write_json, write_whole
from dqn_fast.train import Args, train


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    """Half a file is never seen under the name, and nothing else is left behind."""
    path = tmp_path / "file"
    write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_get_the_usual_rights(tmp_path):
    """Not those of a temporary file, which others cannot read."""
    write_whole(tmp_path / "ours", lambda file: file.write(b""))
    (tmp_path / "usual").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "usual").stat().st_mode
    )


def test_json_is_strict(tmp_path):
    """What is not a number is null, nested too."""
    write_json(tmp_path / "x.json", {"a": math.nan, "b": [1.0, math.inf], "c": {"d": -math.inf}})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": None, "b": [1.0, None], "c": {"d": None}}
    assert "NaN" not in text


def test_checkpoints_hold_plain_values_only(tmp_path):
    """Both load without running code, and hold tensors, text, numbers, None, dicts and lists."""

    def check(value):
        if isinstance(value, dict):
            for key, item in value.items():
                assert type(key) is str
                check(item)
        elif isinstance(value, (list, tuple)):
            assert type(value) in (list, tuple)
            for item in value:
                check(item)
        else:
            assert value is None or type(value) in (torch.Tensor, str, int, float, bool)

    run_dir = tmp_path / "run"
    args = Args(total_timesteps=2_000, num_seeds=2, eps_repeat=0.5, quiet=True, report=False)
    train(replace(args, run_dir=run_dir))
    for name in ("checkpoint.pt", "best.pt"):
        content = torch.load(run_dir / name, weights_only=True)
        check(content)


def test_best_keeps_each_members_best():
    """Members improve at different times; what was best stays although the network goes on."""
    network = QNetwork((2, 2))
    q_net = QFunction(network, ScalarHead(), network.init(Noise(0, 2)))
    best = BestAgent(2)

    def set_to(value):
        with torch.no_grad():
            for param in q_net.parameters():
                param.fill_(value)

    for value, returns, expected in (
        (1.0, [0.5, 0.5], True),
        (2.0, [0.4, 0.9], True),
        (3.0, [0.5, 0.9], False),
        (4.0, [math.nan, 0.1], False),
    ):
        set_to(value)
        assert best.offer(q_net, returns, int(value)) is expected
    assert best.return_mean == [0.5, 0.9]
    assert best.global_step == [1, 2]
    assert best.weights["weight_0"][:, 0, 0].tolist() == [1.0, 2.0]
