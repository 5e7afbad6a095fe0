"""Files that are no agents of this program, or name what is foreign: one line, and nothing runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import shlex
import sys
import zipfile
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch

from dqn_fast import evaluate
from dqn_fast.agent import load_agent
from dqn_fast.envs import LineWorld, NotNamedError, Recipe, make_env
from dqn_fast.envs.foreign import doubtful_param, flags_for
from dqn_fast.networks import QNetwork
from dqn_fast.noise import Noise
from dqn_fast.record.archive import check_archive
from dqn_fast.record.checkpoint import save_checkpoint

M = 2


def agent_file(**changes: Any) -> dict[str, Any]:
    """Content of the file of two agents for LineWorld-v0."""
    network = QNetwork((15, 8, 2))
    return {
        "env_id": "LineWorld-v0",
        "env_params": {"n_states": 15, "slip_prob": 0.05},
        "network": {"sizes": [15, 8, 2], "num_outputs": 1},
        "head": {"name": "scalar", "loss_name": "huber", "num_outputs": 1},
        "q_net": network.named(network.init(Noise(0, M))),
        "members": [{"seed": 0, "gamma": 0.9}, {"seed": 1, "gamma": None}],
        "global_step": [10, 20],
        "eval_return_mean": [0.5, float("nan")],
    } | changes


def for_env(env_id: str, features: int, actions: int, **params: Any) -> dict[str, Any]:
    network = QNetwork((features, actions))
    described = {"sizes": [features, actions], "num_outputs": 1}
    weights = network.named(network.init(Noise(0, M)))
    return agent_file(env_id=env_id, env_params=params, network=described, q_net=weights)


def assert_refused(run_dir: Path, monkeypatch: Any, capsys: Any, *flags: str) -> str:
    """Python raises ValueError in one line, the command prints it and exits with 2."""
    with pytest.raises(ValueError) as caught:
        load_agent(run_dir, device="cpu")
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1_500
    assert str(run_dir / "best.pt") in message
    monkeypatch.setattr(sys, "argv", ["evaluate", str(run_dir), "--device", "cpu", *flags])
    assert evaluate.main() == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")
    return message


def test_the_file_of_these_tests_is_in_order(tmp_path):
    """So that each refusal has one reason."""
    save_checkpoint(tmp_path / "best.pt", agent_file())
    agent = load_agent(tmp_path, device="cpu")
    assert (agent.member, agent.env_id, agent.global_step) == (0, "LineWorld-v0", [10, 20])


def weights(change: Any) -> dict[str, Any]:
    """The file with one parameter replaced."""
    content = agent_file()
    content["q_net"]["weight_0"] = change(content["q_net"]["weight_0"])
    return content


def sizes(*values: Any, **network: Any) -> dict[str, Any]:
    return agent_file(network={"sizes": list(values), "num_outputs": 1, **network})


deep: Any = []
for _ in range(300):
    deep = [deep]
many: Any = ["a"]
for _ in range(40):
    many = [many, many]

ODD: dict[str, Any] = {
    "no env_id": agent_file(env_id=None),
    "env_id a number": agent_file(env_id=3),
    "env_id empty": agent_file(env_id=""),
    "env_id unknown": agent_file(env_id="Nowhere-v0"),
    "env_id with a newline": agent_file(env_id="Nowhere-v0\n\x1b[2J"),
    "env_id long": agent_file(env_id="x" * 10_000),
    "env_params a list": agent_file(env_params=[1]),
    "env_params None": agent_file(env_params=None),
    "env_params text": agent_file(env_params="n_states"),
    "env_params keys": agent_file(env_params={3: 4}),
    "env_params unknown": agent_file(env_params={"speed": 3}),
    "env_params out of range": agent_file(env_params={"n_states": -15}),
    "env_params wrong type": agent_file(env_params={"n_states": [15]}),
    "env_params NaN": agent_file(env_params={"n_states": float("nan")}),
    "env_params infinite": agent_file(env_params={"max_steps": float("inf")}),
    "env_params deep": agent_file(env_params={"n_states": deep}),
    "env_params exponential": agent_file(env_params={"n_states": many}),
    "max_steps huge": agent_file(env_params={"n_states": 15, "max_steps": 2**63}),
    "n_states huge": agent_file(env_params={"n_states": 2**40}),
    "features differ": agent_file(env_params={"n_states": 16}),
    "env differs": agent_file(env_id="CartPole-v1", env_params={}),
    "actions differ": for_env("LineWorld-v0", 15, 3),
    "not Discrete": for_env("Pendulum-v1", 3, 2),
    "gym parameter": for_env("gym:CartPole-v1", 4, 2, max_episode_steps=-3),
    "gym unknown parameter": for_env("gym:CartPole-v1", 4, 2, mass=3),
    "table parameter": for_env("FrozenLake-v1", 16, 4, map_name="none such"),
    "table of a wrong map": for_env("FrozenLake-v1", 16, 4, desc=["SX", "FF"]),
    "not installed": for_env("Ant-v4", 4, 2),
    "global_step exponential": agent_file(global_step=many),
    "members exponential": agent_file(members=many),
    "sizes exponential": agent_file(network={"sizes": many, "num_outputs": 1}),
    "head exponential": agent_file(head={"name": "scalar", "loss_name": many}),
    "network exponential": agent_file(network=many),
    "num_outputs exponential": sizes(15, 8, 2, num_outputs=many),
    "members a dict": agent_file(members={"seed": 0}),
    "members too few": agent_file(members=[{}]),
    "members of lists": agent_file(members=[[], []]),
    "members with text": agent_file(members=[{"gamma": "0.9"}] * M),
    "members with escapes": agent_file(members=[{"\x1b[2J": 1}] * M),
    "members with huge numbers": agent_file(members=[{"gamma": 10**400}] * M),
    "global_step a number": agent_file(global_step=3),
    "global_step too many": agent_file(global_step=[1, 2, 3]),
    "global_step negative": agent_file(global_step=[1, -2]),
    "global_step floats": agent_file(global_step=[1.0, 2.0]),
    "global_step text": agent_file(global_step=["1", "2"]),
    "global_step a tensor": agent_file(global_step=torch.tensor([1, 2])),
    "returns None": agent_file(eval_return_mean=None),
    "returns empty": agent_file(eval_return_mean=[]),
    "returns too many": agent_file(eval_return_mean=[0.0] * 3),
    "returns text": agent_file(eval_return_mean=["high", "low"]),
    "returns a tensor": agent_file(eval_return_mean=torch.zeros(2)),
    "returns huge": agent_file(eval_return_mean=[10**400, 0.0]),
    "network a list": agent_file(network=[15, 8, 2]),
    "network a number": agent_file(network=7),
    "sizes huge": sizes(2**60, 8, 2),
    "sizes huge inside": sizes(15, 10**30, 2),
    "sizes negative": sizes(15, -8, 2),
    "sizes zero": sizes(15, 0, 2),
    "sizes text": sizes("15", "8", "2"),
    "sizes floats": sizes(15.0, 8.0, 2.0),
    "sizes one": sizes(15),
    "sizes none": sizes(),
    "sizes many": sizes(15, *[8] * 500, 2),
    "num_outputs huge": sizes(15, 8, 2, num_outputs=2**40),
    "num_outputs zero": sizes(15, 8, 2, num_outputs=0),
    "num_outputs text": sizes(15, 8, 2, num_outputs="1"),
    "network extra": sizes(15, 8, 2, colour="red"),
    "head unknown": agent_file(head={"name": "os.system"}),
    "head a list": agent_file(head=["scalar"]),
    "head's name a list": agent_file(head={"name": ["scalar"]}),
    "head extra": agent_file(head={"name": "scalar", "colour": 1}),
    "head outputs": agent_file(head={"name": "scalar", "num_outputs": 5}),
    "q_net a list": agent_file(q_net=[torch.zeros(2, 15, 8)]),
    "q_net empty": agent_file(q_net={}),
    "weight a list": weights(lambda _: [1.0]),
    "weight None": weights(lambda _: None),
    "weight missing a member": weights(lambda w: w[:1]),
    "weight a vector": weights(lambda w: w.flatten()),
    "weight a scalar": weights(lambda _: torch.tensor(1.0)),
    "weight without members": weights(lambda w: w[:0]),
    "weight double": weights(lambda w: w.double()),
    "weight half": weights(lambda w: w.half()),
    "weight whole numbers": weights(lambda w: w.long()),
    "weight complex": weights(lambda w: w + 1j),
    "weight NaN": weights(lambda w: w * float("nan")),
    "weight infinite": weights(lambda w: w / 0),
    "weight meta": weights(lambda w: w.to("meta")),
    "weight sparse": weights(lambda w: w.to_sparse()),
    "weight truth values": weights(lambda w: w.bool()),
    "weight strided": weights(lambda w: torch.zeros(1).expand(M, 15, 8)),
    "weight strided and huge": weights(lambda w: torch.zeros(1).expand(M, 2**30, 2**30)),
    "weight with gaps": weights(lambda w: torch.zeros(M, 15, 16)[:, :, ::2]),
    "a list": [agent_file()],
    "a tensor": torch.zeros(3),
    "text": "agent",
    "empty": {},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_contents_are_refused(name, tmp_path, monkeypatch, capsys):
    """Wrong types, lengths, sizes and numbers: one line that names the file, and nothing is
    allocated for sizes that the file does not hold."""
    torch.save(ODD[name], tmp_path / "best.pt")
    assert_refused(tmp_path, monkeypatch, capsys)


def archive(change: Any = lambda name, data: data, **arguments: Any) -> bytes:
    """The file with its entries changed."""
    whole, other = io.BytesIO(), io.BytesIO()
    torch.save(agent_file(), whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(other, "w", **arguments) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry.filename)))
    return other.getvalue()


def with_pickle(content: bytes) -> bytes:
    return archive(lambda name, data: content if name.endswith("data.pkl") else data)


class Runs:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("it_ran",)


GOOD = archive()
BYTES: dict[str, bytes] = {
    "empty": b"",
    "text": b"not a checkpoint",
    "cut in the middle": GOOD[: len(GOOD) // 2],
    "cut at the end": GOOD[:-30],
    "a bomb": archive(lambda name, data: bytes(10**7), compression=zipfile.ZIP_DEFLATED),
    "compressed": archive(compression=zipfile.ZIP_DEFLATED),
    "runs": with_pickle(pickle.dumps({"q_net": Runs()}, 2)),
    "a pickle that runs": pickle.dumps(Runs()),
    "asks for memory": with_pickle(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R."),
    "names eval": with_pickle(b"\x80\x02cbuiltins\neval\nX\x01\0\0\0001\x85R."),
    "no pickle": archive(lambda name, data: data if "data" not in name else b""),
    "a pickle cut off": with_pickle(b"\x80\x02}"),
    "the old format of torch": b"",
    "a zip of nothing": b"PK\x05\x06" + bytes(18),
}
_old = io.BytesIO()
torch.save(agent_file(), _old, _use_new_zipfile_serialization=False)
BYTES["the old format of torch"] = _old.getvalue()


@pytest.mark.parametrize("name", BYTES)
def test_odd_bytes_are_refused(name, tmp_path, monkeypatch, capsys):
    """Nothing is unpacked and nothing runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.pt").write_bytes(BYTES[name])
    assert "not a checkpoint" in assert_refused(tmp_path, monkeypatch, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def unreadable(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    path.write_bytes(GOOD)
    path.chmod(0)


NO_FILES: dict[str, Any] = {
    "nothing": lambda path: None,
    "a directory": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/null"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "no right to read": unreadable,
}


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_is_refused(name, tmp_path, monkeypatch, capsys):
    """It does not wait for a pipe, and reads no device."""
    NO_FILES[name](tmp_path / "best.pt")
    assert_refused(tmp_path, monkeypatch, capsys)


def test_a_folder_that_cannot_be_is_refused():
    """A name that is too long for the file system."""
    with pytest.raises(ValueError, match="File name too long"):
        load_agent("x" * 300)


def test_whole_archives_pass(tmp_path):
    """Tensors of every plain dtype, as checkpoints have them."""
    kinds = (torch.float64, torch.bfloat16, torch.int16, torch.bool, torch.uint8, torch.complex64)
    content = {"tensors": [torch.zeros(2, 3, dtype=kind) for kind in kinds], "big": 2**200}
    save_checkpoint(tmp_path / "x", content)
    check_archive(tmp_path / "x")
    (tmp_path / "x").write_bytes(GOOD)
    check_archive(tmp_path / "x")


# -------------------------------------------------------------------------- nothing foreign is run

PLANTED = """
import gymnasium, pathlib
from gymnasium.envs.classic_control import CartPoleEnv
pathlib.Path(__file__).with_name("it_ran").touch()
class Named(CartPoleEnv):
    def __init__(self, level="easy", map_file="", **kwargs):
        super().__init__(**kwargs)
        self.given = (level, map_file)
gymnasium.register("Planted-v0", Named, max_episode_steps=9)
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported."""
    (tmp_path / "planted_env.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "it_ran"
    sys.modules.pop("planted_env", None)
    gymnasium.registry.pop("Planted-v0", None)


@pytest.mark.parametrize("prefix", ["", "gym:"])
def test_a_module_is_imported_only_if_it_is_named(prefix, planted, tmp_path, monkeypatch, capsys):
    """The message has the command and the call; both work as they stand."""
    run_dir = tmp_path / "a run"
    run_dir.mkdir()
    env_id = f"{prefix}planted_env:Planted-v0"
    save_checkpoint(run_dir / "best.pt", for_env(env_id, 4, 2, level="hard"))
    message = assert_refused(run_dir, monkeypatch, capsys)
    assert f"its environment is {env_id}; importing planted_env is done only if" in message
    assert not planted.exists()

    command, call = message.partition("name it: ")[2].split(", or ")
    assert command.startswith("python -m dqn_fast.evaluate ")
    argv = ["evaluate", *shlex.split(command)[3:], "--episodes", "3"]
    monkeypatch.setattr(sys, "argv", argv)
    assert evaluate.main() == 0
    lines = capsys.readouterr()
    assert lines.err == ""
    assert json.loads(lines.out.splitlines()[-1])["members"][0]["length_mean"] <= 9
    assert planted.exists()
    agent = eval(call, {"load_agent": load_agent})
    assert agent.env.params == {"level": "hard"}
    agent.env.close()


def test_parameters_that_name_files_have_to_be_named(planted, tmp_path, monkeypatch, capsys):
    """Naming the environment is not enough for them; the command in the message is."""
    content = for_env("planted_env:Planted-v0", 4, 2, level="hard", map_file="/etc/passwd")
    save_checkpoint(tmp_path / "best.pt", content)
    assert_refused(tmp_path, monkeypatch, capsys)
    with pytest.raises(
        ValueError, match="parameter map_file is done only if you name it"
    ) as caught:
        load_agent(tmp_path, device="cpu", env_id="planted_env:Planted-v0")
    assert not planted.exists()
    call = str(caught.value).split(", or ")[1]
    agent = eval(call, {"load_agent": load_agent})
    assert agent.env.params == {"level": "hard", "map_file": "/etc/passwd"}
    agent.env.close()
    command = str(caught.value).partition("name it: ")[2].split(", or ")[0]
    monkeypatch.setattr(sys, "argv", ["evaluate", *shlex.split(command)[3:], "--episodes", "2"])
    assert evaluate.main() == 0


def test_another_environment_than_the_files_is_said(tmp_path, monkeypatch, capsys):
    """One line, and it plays the one that was named; it must fit the network."""
    save_checkpoint(tmp_path / "best.pt", agent_file(env_id="elsewhere:Line-v0", env_params={}))
    argv = ["evaluate", str(tmp_path), "--env-id", "LineWorld-v0", "--episodes", "2"]
    monkeypatch.setattr(sys, "argv", [*argv, "--env-params", "max_steps", "7"])
    assert evaluate.main() == 0
    lines = capsys.readouterr()
    assert lines.err == "note: the run is of elsewhere:Line-v0, and plays LineWorld-v0 here\n"
    assert json.loads(lines.out.splitlines()[-1])["members"][0]["length_mean"] <= 7
    monkeypatch.setattr(sys, "argv", [*argv, "--env-params", "n_states", "9"])
    assert evaluate.main() == 2
    assert "has 9 features and 2 actions, its network 15 and 2" in capsys.readouterr().err
    assert isinstance(load_agent(tmp_path, env=LineWorld()).env, LineWorld)


FOREIGN: list[tuple[str, dict[str, Any]]] = [
    ("os:X-v0", {}),
    ("gym:os.path:X-v0", {}),
    ("a:b:c", {}),
    ("GymV21Environment-v0", {"env_id": "os:X-v0"}),
    ("GymV26Environment-v0", {"env_id": "X-v0"}),
    ("dqn_fast/CartPole-v1", {"env": "os:X-v0"}),
    ("dqn_fast/CartPole-v1", {"env": "LineWorld-v0"}),
    ("CartPole-v1", {"render_mode": "human"}),
    ("Ant-v5", {"xml_file": "/tmp/x.xml"}),
    ("Ant-v5", {"xml_file": "x"}),
    ("Ant-v5", {"xmlFile": "x"}),
    ("Any-v0", {"level": "a.b"}),
    ("Any-v0", {"level": "~"}),
    ("Any-v0", {"level": "..\\x"}),
    ("Any-v0", {"level": ["a", ["m:f"]]}),
    ("Any-v0", {"level": '["m:f"]'}),
    ("Any-v0", {"options": {"entry_point": "x"}}),
    ("Any-v0", {"callback": "system"}),
    ("Any-v0", {"level": object()}),
    ("Any-v0", {"level": deep}),
    ("Any-v0", {"level": many}),
]


def refusal(env_id: str, params: dict[str, Any], named: str | None = None) -> str | None:
    """What the person, who may have named the id, has to name of an environment in a file."""
    try:
        Recipe(env_id, params=params).named(named)
    except NotNamedError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("env_id", "params"), FOREIGN, ids=range(len(FOREIGN)))
def test_what_may_run_something_is_refused(env_id, params):
    """Modules, environments, files, windows and callables, nested too."""
    assert refusal(env_id, params)
    assert ":" not in env_id.removeprefix("gym:") or refusal(env_id, {}, env_id) is None


@pytest.mark.parametrize(
    ("env_id", "params"),
    [
        ("LineWorld-v0", {"n_states": 15, "slip_prob": "0.1"}),
        ("FrozenLake-v1", {"map_name": "8x8", "is_slippery": False, "reward_schedule": (1, 0, 0)}),
        ("gym:FrozenLake-v1", {"desc": ["SF", "FG"]}),
        ("ALE/Pong-v5", {"obs_type": "ram", "frameskip": [2, 5], "mode": None}),
        ("LunarLander-v3", {"enable_wind": True, "gravity": -9.5, "render_mode": None}),
    ],
)
def test_plain_parameters_of_registered_ids_need_no_name(env_id, params):
    """As runs have them."""
    assert refusal(env_id, params) is None


def test_no_registered_environment_needs_a_name():
    """All of Gymnasium's and this program's ids with their registered parameters."""
    for env_id, spec in gymnasium.registry.items():
        assert refusal(env_id, {}) is None
        assert refusal(env_id, {"max_episode_steps": 100}) is None
        numbers = {k: v for k, v in spec.kwargs.items() if not isinstance(v, str)}
        assert doubtful_param(numbers) is None


def test_flags_are_what_the_command_line_reads(tmp_path):
    """The flags in a message give the same values; what nobody can type gives none."""
    params = {"map_name": "8x8", "reward_schedule": [1, 0, 0], "is_slippery": False}
    words = shlex.split(flags_for("gym:FrozenLake-v1", params) or "")
    assert words[:3] == ["--env-id", "gym:FrozenLake-v1", "--env-params"]
    env: Any = make_env(words[1], dict(zip(words[3::2], words[4::2], strict=True)))
    assert env.params["reward_schedule"] == [1, 0, 0]
    assert env.params["is_slippery"] is False
    env.close()
    assert flags_for("a:b; rm -rf x", {}) == "--env-id 'a:b; rm -rf x'"
    assert flags_for("a:b\n", {}) is None
    assert flags_for("a:" + "b" * 600, {}) is None


def test_too_many_episodes_are_one_line(tmp_path, monkeypatch, capsys):
    """Their memory is computed before anything is allocated."""
    save_checkpoint(tmp_path / "best.pt", agent_file())
    argv = ["evaluate", str(tmp_path), "--episodes", "2147483647"]
    monkeypatch.setattr(sys, "argv", argv)
    assert evaluate.main() == 2
    lines = capsys.readouterr()
    assert lines.out == ""
    assert lines.err.startswith("error: --episodes 2147483647: must be at most ")
    assert len(lines.err.splitlines()) == 1
