"""Trained agents, loaded from the files of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dqn_fast.device import choose_device
from dqn_fast.dqn import QFunction
from dqn_fast.envs import TensorEnv, UnknownEnvError, make_env
from dqn_fast.heads import make_head
from dqn_fast.networks import QNetwork
from dqn_fast.record.checkpoint import load_checkpoint

AgentFile = Literal["best", "last"]
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
        self._device = q_net.device
        self._stored = env.example_obs()[0]

    @torch.no_grad()
    def q_values(self, obs: Tensor) -> Tensor:
        """Q-values [..., A] of one observation or a batch, of any leading shape.

        Args:
            obs: an observation as `observe` returns it; if those differ in kind or shape from
                `features`, also the network's input, float [..., F].
        """
        obs = obs.to(self._device)
        is_float = obs.is_floating_point()
        if is_float:
            obs = obs.float()
        is_stored = (
            is_float == self._stored.is_floating_point()
            and obs.shape[obs.ndim - self._stored.ndim :] == self._stored.shape
        )
        if is_stored or not (is_float and obs.shape[-1:] == (self.q_net.network.sizes[0],)):
            obs = self.env.features(obs)
        rows = obs.reshape(-1, obs.shape[-1]).expand(self.q_net.num_members, -1, -1)
        return self.q_net(rows)[self.member].reshape(*obs.shape[:-1], -1)

    @overload
    def act(self, obs: Tensor) -> Tensor: ...
    @overload
    def act(self, obs: NDArray[Any] | float) -> NDArray[np.int64]: ...
    def act(self, obs: Tensor | NDArray[Any] | float) -> Tensor | NDArray[np.int64]:
        """Greedy action of one observation or of each in a batch; int64, NumPy for NumPy input."""
        if isinstance(obs, Tensor):
            return self.q_values(obs).argmax(-1)
        return self.q_values(torch.as_tensor(np.asarray(obs))).argmax(-1).cpu().numpy()


def load_agent(
    run_dir: Path | str,
    which: AgentFile = "best",
    member: int | None = None,
    env: TensorEnv | None = None,
    device: str = "auto",
) -> Agent:
    """Load a saved agent.

    Args:
        run_dir: directory of the run.
        which: "best", of the best evaluation during training, or "last".
        member: number of the member; None takes the member with the best evaluation.
        env: the environment; None makes it from the run's own settings.
        device: as the flag --device.

    Raises:
        ValueError: the run, the agent or the member does not exist, or the file cannot be read.
    """
    if which not in AGENT_FILES:
        raise ValueError(f"agent {which}: must be one of {', '.join(AGENT_FILES)}")
    path, last = (Path(run_dir) / AGENT_FILES[name] for name in (which, "last"))
    if not path.exists() and last.exists():
        raise ValueError(f"{path}: does not exist, no evaluation was made; use --agent last")
    content = load_checkpoint(path, choose_device(device))
    try:
        env = env or make_env(content["env_id"], content["env_params"])
    except UnknownEnvError as error:
        raise ValueError(
            f"{path}: was trained on {content['env_id']}, which is no known id here; give the "
            f"environment, load_agent(run_dir, env=...)"
        ) from error
    returns = content["eval_return_mean"]
    try:
        q_net = read_q_function(content)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its network cannot be read ({error})") from error
    if member is None:
        member = int(np.argmax(np.nan_to_num(returns, nan=-np.inf)))
    if not 0 <= member < len(returns):
        raise ValueError(f"member {member}: must be in 0 .. {len(returns) - 1}")
    return Agent(env, q_net, member, content["global_step"], returns, content.get("members"))


def read_q_function(content: Mapping[str, Any]) -> QFunction:
    """Q-values of the network in a checkpoint, which describes network and head. Checkpoints of the
    first format have the network's sizes only.

    Raises:
        KeyError, TypeError, ValueError: the parameters do not match the description.
    """
    described = dict(content.get("network") or {"sizes": content["sizes"]})
    network = QNetwork(**{**described, "sizes": tuple(described["sizes"])})
    head = make_head(content.get("head") or {"name": "scalar"})
    return QFunction(network, head, network.from_named(content["q_net"]))
