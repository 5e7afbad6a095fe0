"""Trained agents, loaded from the files of a run."""

from __future__ import annotations

import copy
import os
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from dqn_fast.ambient import in_standard_state, standard_state
from dqn_fast.device import choose_device
from dqn_fast.dqn import QFunction
from dqn_fast.envs import (
    NotNamedError,
    OwnedError,
    Recipe,
    TensorEnv,
    UnknownEnvError,
    differences,
    need_tensor_env,
)
from dqn_fast.envs.spaces import describe_error, describe_value
from dqn_fast.heads import make_head
from dqn_fast.networks import QNetwork
from dqn_fast.record.checkpoint import load_newest

AgentFile = Literal["best", "last"]
_MOST_STEPS = 2**31 - 1
"""Longest episode; steps are counted as int32."""
AGENT_FILES: dict[str, str] = {"best": "best.pt", "last": "checkpoint.pt"}


class Agent:
    """A trained greedy agent.

    Attributes:
        env: the environment on which it was trained.
        q_net: Q-values of all M members.
        member: the member that acts.
        members: seed and swept settings of each member, [M].
        global_step: global_step at which each member's weights were saved, [M].
        eval_return_mean: mean return of these weights, for each member, [M]; NaN if not evaluated.
        env_id: name of the environment in the file; empty if the agent is from no file.
    """

    def __init__(
        self,
        env: TensorEnv,
        q_net: QFunction,
        member: int,
        global_step: list[int],
        eval_return_mean: list[float],
        members: list[dict[str, Any]] | None = None,
    ) -> None:
        self.members = members or [{} for _ in eval_return_mean]
        self.env, self.q_net, self.member = env, q_net, member
        self.global_step, self.eval_return_mean = global_step, eval_return_mean
        self.env_id = ""
        self._device = q_net.device

    def on(self, env: TensorEnv) -> Agent:
        """The same agent on another environment of the same features and actions.

        Raises:
            ValueError: it does not fit.
        """
        need_tensor_env(env)
        _check_fit(env, self.q_net, "the agent")
        agent = copy.copy(self)
        agent.env = env
        return agent

    @in_standard_state
    @torch.no_grad()
    def q_values(self, obs: Any) -> Tensor:
        """Q-values [..., A] of one observation or a batch.

        Args:
            obs: what the environment's reset and step return, or those of a VectorEnv of it, with
                any leading axes; for environments of tensors also what `observe` returns.

        Raises:
            ValueError: it is no observation of the environment; one line.
        """
        return self.values(self.env.features_of(obs))

    @torch.no_grad()
    def values(self, features: Tensor) -> Tensor:
        """Q-values [..., A] of the network's inputs, float32 [..., F]."""
        rows = features.to(self._device).reshape(-1, features.shape[-1])
        q_values = self.q_net(rows.expand(self.q_net.num_members, -1, -1))[self.member]
        return q_values.reshape(*features.shape[:-1], -1)

    @overload
    def act(self, obs: Tensor) -> Tensor: ...
    @overload
    def act(self, obs: Any) -> Any: ...
    def act(self, obs: Any) -> Any:
        """Greedy action of one observation or of each in a batch, as the environment numbers it.

        Args:
            obs: as for `q_values`.

        Returns:
            int64, a tensor for a tensor; else NumPy's number for one observation, an array for a
            batch.

        Raises:
            ValueError: it is no observation of the environment; one line.
        """
        action = self.q_values(obs).argmax(-1) + self.env.action_start
        return action if isinstance(obs, Tensor) else action.cpu().numpy()[()]


@standard_state()
def load_agent(
    run_dir: Path | str,
    which: AgentFile = "best",
    member: int | None = None,
    env: TensorEnv | str | None = None,
    device: str = "auto",
    env_id: str | None = None,
    env_params: Mapping[str, Any] | None = None,
    wrappers: Sequence[str] | None = None,
) -> Agent:
    """Load a saved agent.

    It plays the environment on which it was trained. Nothing foreign is run: a file may choose an
    environment that is registered here, with numbers and plain words as parameters. A module is
    imported, and other parameters are used, only if you name them.

    Args:
        run_dir: directory of the run.
        which: "best", of the best evaluation during training, or "last".
        member: number of the member; None takes the member with the best evaluation.
        env: the environment, or the import path of a callable that makes it, "module:callable";
            None makes it from the run's own settings.
        device: as the flag --device.
        env_id: name of the environment to make, such as "module:ID"; None: the one in the file.
        env_params: parameters of the environment, in place of those in the file that have their
            names.
        wrappers: "module:Wrapper,key=value", in place of those in the file.

    Warns:
        RuntimeWarning: the environment that you name has other wrappers than the run's.

    Raises:
        ValueError: the run, the agent or the member does not exist, the file cannot be read, or its
            environment must be named; one line.
    """
    if env is not None and not isinstance(env, str):
        need_tensor_env(env)
    if which not in AGENT_FILES:
        raise ValueError(f"agent {which}: must be one of {', '.join(AGENT_FILES)}")
    if not isinstance(run_dir, str | os.PathLike):
        raise ValueError(f"run_dir {describe_value(run_dir)}: must be the directory of a run")
    if member is not None and not isinstance(member, int | np.integer):
        raise ValueError(f"member {member}: must be a whole number")
    path, last = (Path(run_dir) / AGENT_FILES[name] for name in (which, "last"))
    try:
        if not path.exists() and last.exists():
            raise ValueError(f"{path}: does not exist, no evaluation was made; use --agent last")
    except OSError as error:
        raise ValueError(f"{shown(path)}: {error.strerror}") from error
    _, content, notes = load_newest(path, choose_device(str(device)))
    for note in notes:
        warnings.warn(note, RuntimeWarning, stacklevel=2)
    try:
        q_net = read_q_function(content)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = shown(error) if isinstance(error, ValueError) else shown(describe_error(error))
        raise ValueError(f"{path}: its network cannot be read ({reason})") from error
    try:
        check_agent(content, q_net.num_members)
    except ValueError as error:
        raise ValueError(f"{path}: {shown(error)}") from None
    returns = content["eval_return_mean"]
    if member is None:
        member = int(np.argmax(np.nan_to_num(returns, nan=-np.inf)))
    if not 0 <= member < len(returns):
        raise ValueError(f"member {member}: must be in 0 .. {len(returns) - 1}")
    made = None
    if not isinstance(env, TensorEnv):
        env = made = _make_env(path, content, env_id, env_params or {}, env, wrappers)
    try:
        _check_fit(env, q_net, path)
        agent = Agent(env, q_net, member, content["global_step"], returns, content.get("members"))
    except BaseException:
        if made is not None:
            made.close()
        raise
    agent.env_id = content["env_id"]
    for line in differences(content.get("environment") or {}, env):
        warnings.warn(f"{path}: {shown(line)}", RuntimeWarning, stacklevel=2)
    return agent


def _make_env(
    path: Path,
    content: Mapping[str, Any],
    env_id: str | None,
    env_params: Mapping[str, Any],
    env: str | None,
    wrappers: Sequence[str] | None,
) -> TensorEnv:
    """The environment of a file, as far as the file may choose it.

    Raises:
        ValueError: it cannot be made, or must be named.
    """
    name = shown(content["env_id"])
    try:
        recipe = Recipe.read(content).named(env_id, env_params, env, wrappers)
    except NotNamedError as unnamed:
        how = "load_agent(run_dir, env=...)"
        if unnamed.flags is not None:  # else the parameters may be too many to print
            folder = str(path.parent)
            call = ", ".join(f"{key}={value!r}" for key, value in unnamed.arguments.items())
            how = (
                f"python -m dqn_fast.evaluate {shlex.quote(folder)} {unnamed.flags}, or "
                f"load_agent({folder!r}, {call})"
            )
        raise ValueError(
            f"{path}: its environment is {name}; {shown(unnamed)} is done only if you name it: "
            f"{how}"
        ) from None
    except OwnedError as owned:
        raise ValueError(f"{path}: its environment, {name}, {shown(owned)}") from None
    except ValueError as error:
        raise ValueError(shown(error)) from None
    try:
        return recipe.make(in_process=True)
    except UnknownEnvError as error:
        raise ValueError(
            f"{path}: was trained on {shown(recipe.env_id)}, which is no known id here; give the "
            f"environment, load_agent(run_dir, env=...)"
        ) from error
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else describe_error(error)
        raise ValueError(f"{path}: its environment cannot be made ({shown(reason)})") from error


def _check_fit(env: TensorEnv, q_net: QFunction, path: Path | str) -> None:
    """Refuse an environment with other features or actions than the network has.

    Raises:
        ValueError: they differ.
    """
    sizes = q_net.network.sizes
    try:
        obs = env.example_obs()
        try:
            # Shapes alone: a wrong parameter may make features too many to compute.
            num_features = env.features(obs.to("meta")).shape[-1]
        except (RuntimeError, TypeError, ValueError):
            num_features = env.features(obs).shape[-1]
        fits = (num_features, env.num_actions) == (sizes[0], sizes[-1])
        limit = 1 <= env.max_steps <= _MOST_STEPS
    except Exception as error:
        reason = shown(describe_error(error))
        raise ValueError(f"{path}: its environment cannot be used ({reason})") from error
    if not fits:
        raise ValueError(
            f"{path}: its environment has {num_features:,} features and {env.num_actions:,} "
            f"actions, its network {sizes[0]:,} and {sizes[-1]:,}"
        )
    if not limit:
        raise ValueError(
            f"{path}: its environment has max_steps {env.max_steps}, which must be in "
            f"1 .. {_MOST_STEPS:,}"
        )


def read_q_function(content: Mapping[str, Any]) -> QFunction:
    """Q-values of the network in a checkpoint, which describes network and head. Checkpoints of the
    first format have the network's sizes only.

    Raises:
        KeyError, TypeError, ValueError: the parameters do not match the description.
    """
    described = dict(content.get("network") or {"sizes": content["sizes"]})
    sizes, params = described["sizes"], content["q_net"]
    if not (isinstance(sizes, list | tuple) and all(type(size) is int for size in sizes)):
        raise ValueError(f"sizes {describe_value(sizes)}: must be a list of whole numbers")
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes {shown(sizes)}: must be two numbers or more, each at least 1")
    network = QNetwork(**{**described, "sizes": tuple(sizes)})
    about_head = dict(content.get("head") or {"name": "scalar"})
    if not all(isinstance(value, str | int | float) for value in about_head.values()):
        raise ValueError(f"head {describe_value(about_head)}: must be a dict of text and numbers")
    head = make_head(about_head)
    if type(network.num_outputs) is not int or network.num_outputs != head.num_outputs:
        given = describe_value(network.num_outputs)
        raise ValueError(f"num_outputs {given}: must be {head.num_outputs}")
    if not isinstance(params, Mapping):
        raise ValueError(f"q_net is {describe_value(params)}, not a dict")
    num_members = None
    for name, param in params.items():
        problem = _tensor_problem(param)
        if problem:
            raise ValueError(f"{shown(name)} {problem}")
        if num_members is None:
            num_members = len(param)
        if len(param) != num_members:
            raise ValueError(f"{shown(name)} has {len(param)} members, others {num_members}")
    q_net = QFunction(network, head, network.from_named(params))
    for name, param in params.items():
        if not bool(param.isfinite().all()):
            members = (~param.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            raise ValueError(f"{name} of member {members[0]} is not finite")
    return q_net


def _tensor_problem(param: Any) -> str:
    """Why a value is no parameter of a network; empty if it is one."""
    if type(param) is not Tensor:
        return f"is {describe_value(param)}, not a tensor"
    if param.layout is not torch.strided or param.dtype != torch.float32 or param.is_meta:
        return f"is a tensor of {param.dtype} on {param.device}, {param.layout}; must be float32"
    if param.ndim != 3 or param.numel() == 0:
        return f"has the shape {list(param.shape)}; must be [M, rows, columns]"
    reach = 1 + sum((n - 1) * step for n, step in zip(param.shape, param.stride(), strict=True))
    if reach != param.numel():  # a view of few numbers can stand for any size
        return f"has the strides {param.stride()}, which leave gaps or overlap"
    return ""


def check_agent(content: Mapping[str, Any], num_members: int) -> None:
    """Refuse a checkpoint whose description of the agents is not of the right types and lengths.

    Raises:
        ValueError: the message names the entry, the value and what is allowed.
    """

    def is_number(value: Any) -> bool:
        return type(value) is float or (type(value) is int and abs(value) < 2**63)

    def is_member(value: Any) -> bool:
        return isinstance(value, dict) and all(
            isinstance(name, str)
            and name.isidentifier()
            and (item is None or isinstance(item, bool) or is_number(item))
            for name, item in value.items()
        )

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**63

    env_id, params = content.get("env_id"), content.get("env_params")
    if not (isinstance(env_id, str) and 1 <= len(env_id) <= 1_000):
        raise ValueError(f"env_id {describe_value(env_id)}: must be the name of an environment")
    if not (isinstance(params, dict) and all(isinstance(name, str) for name in params)):
        raise ValueError(f"env_params {describe_value(params)}: must be a dict with text as keys")
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "global_step": (is_count, "counts"),
        "eval_return_mean": (is_number, "numbers"),
        "members": (is_member, "dicts of numbers"),
    }
    for key, (allowed, what) in rules.items():
        values = content.get(key)
        if values is None and key == "members":  # the first format
            continue
        if not (
            isinstance(values, list) and len(values) == num_members and all(map(allowed, values))
        ):
            shape = f"a list of {what}, one for each of {num_members} members"
            raise ValueError(f"{key} {describe_value(values)}: must be {shape}")


def shown(value: object) -> str:
    """A value from a file in one printable line."""
    text = str(value)
    text = text if len(text) <= 200 else text[:197] + "..."
    return text if text.isprintable() else ascii(text)
