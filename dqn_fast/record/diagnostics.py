"""Diagnostics of networks and replay at log points: the content of `diagnostics.npz`.

Nothing here runs inside a chunk or waits for the device. A snapshot takes rows spread evenly over
replay: their TD errors, the hidden units that are 0 on all of them, and the share of them whose
greedy action has changed. Tabular environments add the whole Q-table and the states visited.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dqn_fast import tree
from dqn_fast.dqn import DQN, State
from dqn_fast.envs import TabularEnv
from dqn_fast.exact import ExactValues
from dqn_fast.networks import Params
from dqn_fast.replay import Replay, ReplayState

QUANTILE_LEVELS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
SAMPLE_SIZE = 128
MOST_SNAPSHOTS = 256

Snapshot = dict[str, NDArray[Any]]


class Diagnostics:
    """Snapshots of M members over a run, at most MOST_SNAPSHOTS of them.

    Above that, each two neighbours are merged into the later one, with the visits of both.

    Attributes:
        env: the environment.
        snapshots: arrays by name, one dict per snapshot, in order.
    """

    def __init__(self, dqn: DQN, exact: ExactValues | None) -> None:
        self.snapshots: list[Snapshot] = []
        self.env, self._dqn, self._exact = dqn.env, dqn, exact
        self._count, self._stride = 0, 1
        self._previous: Params | None = None
        self._spread: Tensor | None = None

    @torch.no_grad()
    def take(self, state: State, new_rows: int) -> dict[str, Tensor]:
        """Take a snapshot of networks and replay; does not wait for the device.

        Args:
            state: of the run; its replay is not empty.
            new_rows: transitions of one member stored since the last snapshot.

        Returns:
            The snapshot as tensors on the device; `add` takes them from the host.
        """
        dqn, gamma = self._dqn, state.hyper.gamma
        if self._spread is None:
            self._spread = torch.arange(SAMPLE_SIZE, device=gamma.device)
        noise = self._spread * state.replay.size // SAMPLE_SIZE
        batch = dqn.replay.sample(state.replay, noise, gamma)
        obs = self.env.features(batch.obs)
        *hidden, outputs = dqn.network.activations(state.params, obs)
        q_values = dqn.head.values(outputs)
        if self._previous is None:
            self._keep(state.params)
            changes = q_values.new_full((dqn.num_members,), torch.nan)
        else:
            before = dqn.head.values(dqn.network(self._previous, obs))
            changes = (q_values.argmax(-1) != before.argmax(-1)).float().mean(1)
            torch._foreach_copy_(self._previous, state.params)
        snapshot = {
            "td_error": dqn.td_error(state, batch),
            "dead_units": dead_units(hidden, q_values),
            "policy_changes": changes,
        }
        if self._exact is not None:
            snapshot["q_values"] = self._exact.q_values(dqn.q_function(state))
        if isinstance(self.env, TabularEnv) and self._exact is not None:
            num_states = self._exact.q_star.shape[1]
            snapshot["visits"] = visits(self.env, dqn.replay, state.replay, new_rows, num_states)
        return snapshot

    def add(self, taken: Mapping[str, Tensor], global_step: int, num_syncs: int) -> None:
        """Keep a snapshot.

        Args:
            taken: of `take`, on the host.
            global_step: of the log point.
            num_syncs: synchronisations of the target so far.
        """
        # Copied, so that pinned memory can be reused.
        snapshot: Snapshot = {name: t.numpy().copy() for name, t in taken.items()}
        counts = {"global_step": np.array(global_step), "num_syncs": np.array(num_syncs)}
        self._add(counts | snapshot)

    def _add(self, snapshot: Snapshot) -> None:
        if self._count % self._stride:
            snapshot = _merge(self.snapshots.pop(), snapshot)
        self.snapshots.append(snapshot)
        self._count += 1
        if len(self.snapshots) > MOST_SNAPSHOTS and self._count % (2 * self._stride) == 0:
            pairs = zip(self.snapshots[::2], self.snapshots[1::2], strict=True)
            self.snapshots = [_merge(first, second) for first, second in pairs]
            self._stride *= 2

    def state(self) -> dict[str, Any]:
        """Plain values and tensors, for `load_`; the tensors on the device are not copied."""
        return {
            "snapshots": {
                name: torch.from_numpy(np.stack([s[name] for s in self.snapshots]))
                for name in (self.snapshots or [{}])[0]
            },
            "count": self._count,
            "stride": self._stride,
            "previous": self._previous,
        }

    def load_(self, saved: Mapping[str, Any], params: Params) -> None:
        """Continue from a `state`, with parameters like `params`.

        Raises:
            ValueError: the parameters of the last snapshot do not fit.
        """
        stacked = {name: tensor.numpy() for name, tensor in saved["snapshots"].items()}
        count = max(map(len, stacked.values()), default=0)
        self.snapshots = [{name: a[i] for name, a in stacked.items()} for i in range(count)]
        self._count, self._stride = saved["count"], saved["stride"]
        if saved["previous"] is not None:
            self._keep(params)
            tree.load_(self._previous, saved["previous"])

    def _keep(self, params: Params) -> None:
        """Allocate what the next snapshot is compared with."""
        self._previous = [param.detach().clone() for param in params]

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """All snapshots stacked along a new first axis, and the constants of the run."""
        if not self.snapshots:
            return {}
        names = self.snapshots[0]
        stacked = {name: np.stack([s[name] for s in self.snapshots]) for name in names}
        td_error = stacked.pop("td_error")
        with np.errstate(invalid="ignore"):  # infinity minus infinity, in a failed run
            quantiles = np.quantile(td_error, QUANTILE_LEVELS, axis=-1)
        stacked["td_error_quantiles"] = np.moveaxis(quantiles, 0, -1).astype(np.float32)
        stacked["quantile_levels"] = np.array(QUANTILE_LEVELS)
        stacked["td_error_sample"] = td_error[-1]
        if self._exact is not None:
            q_star = self._exact.q_star.numpy()
            optimal = self._exact.optimal_return
            if (q_star == q_star[0]).all():
                stacked |= {"q_star": q_star[0], "optimal_return": np.array(optimal[0])}
            else:  # members differ in gamma
                stacked |= {"q_star_of_members": q_star}
                stacked |= {"optimal_return_of_members": np.array(optimal)}
            stacked["terminal"] = self._exact.mdp.terminal.numpy()
        return stacked


def _merge(earlier: Snapshot, later: Snapshot) -> Snapshot:
    if "visits" not in later:
        return later
    return later | {"visits": earlier["visits"] + later["visits"]}


def dead_units(hidden: list[Tensor], q_values: Tensor) -> Tensor:
    """Fraction of each member's hidden units that are zero on every row of a batch, [M].

    Args:
        hidden: activations of the hidden layers, >= 0, [M, B, width] each.
        q_values: [M, B, A].
    """
    if not hidden:
        return q_values.new_zeros(len(q_values))
    return (torch.cat(hidden, -1).amax(1) == 0).float().mean(1)


def visits(
    env: TabularEnv, replay: Replay, state: ReplayState, new_rows: int, num_states: int
) -> Tensor:
    """Number of actions taken in each state, over the newest rows of replay: int64 [M, X].

    Rows that replay no longer holds are not counted: with more than C new rows, only the newest C
    count.
    """
    newest = replay.newest(state, min(new_rows, replay.capacity))
    stored = replay.by_member(state).obs
    member = torch.arange(len(stored), device=newest.device)[:, None]
    visited = env.state_index(stored[member, newest])
    times = torch.zeros(len(stored), num_states, dtype=torch.int64, device=newest.device)
    return times.scatter_add_(1, visited.long(), torch.ones_like(newest))
