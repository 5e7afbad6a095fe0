"""What a run looked like from inside, taken at log points: the content of `diagnostics.npz`.

Nothing here runs inside a chunk. Rows spread evenly over replay are looked at: their TD errors, the
hidden units that never fire on them, the states in which the greedy action has changed. Tabular
environments add the whole Q-table and the states visited.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dqn_fast.agent import bootstrap_value, td_target
from dqn_fast.envs import TabularEnv, TensorEnv
from dqn_fast.evaluate import ExactValues
from dqn_fast.networks import QNetwork
from dqn_fast.replay import Replay

QUANTILE_LEVELS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
SAMPLE_SIZE = 256
MOST_SNAPSHOTS = 256

Snapshot = dict[str, NDArray[Any]]


class Diagnostics:
    """Snapshots of M members over a run, at most MOST_SNAPSHOTS of them.

    Beyond that, two neighbours become one: the later one, with the visits of both.

    Attributes:
        env: the environment.
        snapshots: arrays by name, one dict a snapshot, in order.
    """

    def __init__(self, env: TensorEnv, exact: ExactValues | None, double_q: bool = False) -> None:
        self.snapshots: list[Snapshot] = []
        self.env, self._exact, self._double_q = env, exact, double_q
        self._count, self._stride = 0, 1
        self._previous: QNetwork | None = None
        self._td_error = np.zeros((0, 0), np.float32)

    @torch.no_grad()
    def take(
        self,
        q_net: QNetwork,
        target_net: QNetwork,
        replay: Replay,
        gamma: Tensor,
        global_step: int,
        new_rows: int,
        num_syncs: int,
    ) -> None:
        """Take a snapshot.

        Args:
            q_net: online network.
            target_net: target network.
            replay: what is sampled; not empty.
            gamma: [M, 1].
            global_step: of the log point.
            new_rows: transitions of one member stored since the last snapshot.
            num_syncs: synchronisations of the target so far.
        """
        rows = torch.arange(SAMPLE_SIZE, device=gamma.device) * replay.size // SAMPLE_SIZE
        batch = replay.sample(rows)
        obs, next_obs = self.env.features(batch.obs), self.env.features(batch.next_obs)
        *hidden, q_values = q_net.activations(obs)
        q_taken = q_values.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
        next_value = bootstrap_value(q_net, target_net, next_obs, self._double_q)
        target = td_target(next_value, batch.reward, batch.terminated, gamma)
        td_error = target - q_taken
        levels = torch.tensor(QUANTILE_LEVELS, device=td_error.device)
        if self._previous is None:
            changes = torch.full((q_net.num_members,), torch.nan)
        else:
            changes = (q_values.argmax(-1) != self._previous(obs).argmax(-1)).float().mean(1)
        snapshot = {
            "global_step": np.array(global_step),
            "num_syncs": np.array(num_syncs),
            "td_error_quantiles": td_error.quantile(levels, dim=1).T.cpu().numpy(),
            "dead_units": dead_units(hidden, q_values).cpu().numpy(),
            "policy_changes": changes.cpu().numpy(),
        }
        if self._exact is not None:
            snapshot["q_values"] = self._exact.q_values(q_net).float().numpy()
        if isinstance(self.env, TabularEnv) and self._exact is not None:
            snapshot["visits"] = visits(self.env, replay, new_rows, len(self._exact.q_star))
        self._td_error = td_error.cpu().numpy()
        if self._previous is None:
            self._previous = copy.deepcopy(q_net)
        torch._foreach_copy_(self._previous.params, q_net.params)
        self._add(snapshot)

    def _add(self, snapshot: Snapshot) -> None:
        if self._count % self._stride:
            snapshot = _merge(self.snapshots.pop(), snapshot)
        self.snapshots.append(snapshot)
        self._count += 1
        if len(self.snapshots) > MOST_SNAPSHOTS and self._count % (2 * self._stride) == 0:
            pairs = zip(self.snapshots[::2], self.snapshots[1::2], strict=True)
            self.snapshots = [_merge(first, second) for first, second in pairs]
            self._stride *= 2

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """All snapshots stacked along their first axis, and what does not change."""
        if not self.snapshots:
            return {}
        names = self.snapshots[0]
        stacked = {name: np.stack([s[name] for s in self.snapshots]) for name in names}
        stacked["quantile_levels"] = np.array(QUANTILE_LEVELS)
        stacked["td_error_sample"] = self._td_error
        if self._exact is not None:
            stacked["q_star"] = self._exact.q_star.numpy()
            stacked["terminal"] = self._exact.mdp.terminal.numpy()
            stacked["optimal_return"] = np.array(self._exact.optimal_return)
        return stacked


def _merge(earlier: Snapshot, later: Snapshot) -> Snapshot:
    if "visits" not in later:
        return later
    return later | {"visits": earlier["visits"] + later["visits"]}


def dead_units(hidden: list[Tensor], q_values: Tensor) -> Tensor:
    """Share of a member's hidden units that are zero on every row of a batch, [M].

    Args:
        hidden: activations of the hidden layers, [M, B, width] each.
        q_values: [M, B, A].
    """
    if not hidden:
        return torch.zeros(len(q_values))
    return torch.cat([(x == 0).all(1) for x in hidden], 1).float().mean(1)


def visits(env: TabularEnv, replay: Replay, new_rows: int, num_states: int) -> NDArray[np.int64]:
    """How often each state was acted in, over the newest rows of replay: [M, X].

    What replay no longer holds is not counted: with more new rows than it has, the newest stand for
    all.
    """
    count = min(new_rows, replay.capacity)
    newest = (
        replay.cursor - 1 - torch.arange(count, device=replay.cursor.device)
    ) % replay.capacity
    rows = replay.data.obs
    state = env.state_index(torch.stack([obs[row] for obs, row in zip(rows, newest, strict=True)]))
    return torch.stack([torch.bincount(s, minlength=num_states) for s in state]).cpu().numpy()
