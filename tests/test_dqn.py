"""Deep Q-learning against hand-computed numbers and independent implementations."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dqn_fast import tree
from dqn_fast.algorithm import StepInputs, UpdateInputs
from dqn_fast.dqn import (
    DQN,
    Adam,
    Hyper,
    State,
    adam_step_,
    clip_global_norm_,
    epsilon_greedy,
    held_epsilon_greedy,
    sync_target_,
)
from dqn_fast.engines import chunk_
from dqn_fast.envs import LineWorld, TensorEnv, make_env
from dqn_fast.heads import ScalarHead
from dqn_fast.networks import QNetwork
from dqn_fast.noise import Noise, Stream
from dqn_fast.replay import Batch, Replay, ReplayState, Transition
from dqn_fast.setup import Training, setup
from dqn_fast.train import Args

SHORT = Args(total_timesteps=4_000, eval_interval=0, engine="eager", device="cpu", quiet=True)


class Nothing(NamedTuple):
    obs: Tensor


@dataclass(frozen=True)
class Floats(TensorEnv):
    """Observations of `width` zeros: for gradient steps, whose transitions come from elsewhere."""

    width: int = 5
    max_steps: int = 10
    num_actions: ClassVar[int] = 3

    def reset(self, noise: Tensor) -> Nothing:
        return Nothing(noise.new_zeros(len(noise), self.width))

    def step(self, state: Nothing, action: Tensor, noise: Tensor) -> Any:
        return state, state.obs[:, 0], torch.zeros_like(action).bool()

    def observe(self, state: Nothing) -> Tensor:
        return state.obs


def learner(
    sizes: tuple[int, ...],
    num_members: int = 1,
    batch_size: int = 1,
    seed: int = 0,
    gamma: Tensor | float = 0.99,
    max_grad_norm: float = 10.0,
    loss: Any = "huber",
    **settings: Any,
) -> tuple[DQN, State]:
    """A DQN whose replay holds one batch, and a fresh state."""
    env, copies = Floats(sizes[0]), (num_members, batch_size)
    replay = Replay(batch_size, *copies, env.example_obs(), sizes[-1])
    dqn = DQN(env, QNetwork(sizes), ScalarHead(loss), replay, *copies, batch_size, **settings)
    hyper = Hyper(*(torch.zeros(num_members, 1) + x for x in (gamma, max_grad_norm, 0.0)))
    return dqn, dqn.init(Noise(seed, num_members), hyper)


def inputs(t: int, dqn: DQN, rate: float = 1e-3, sync: float = 0.0) -> UpdateInputs:
    """Inputs of gradient step t, counted from 1, in which every stored row is sampled once."""
    m = dqn.num_members
    return UpdateInputs(
        rows=torch.arange(dqn.batch_size).expand(m, -1),
        step_size=torch.full((m,), rate / (1 - 0.9**t)),
        inverse_correction=torch.tensor(1 / math.sqrt(1 - 0.999**t)),
        sync=torch.full((m,), sync),
    )


def random_batch(generator: torch.Generator, members: int, size: int, features: int) -> Transition:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Transition(
        obs=randn(members, size, features),
        action=torch.randint(3, (members, size), generator=generator),
        reward=randn(members, size),
        next_obs=randn(members, size, features),
        terminated=torch.rand((members, size), generator=generator) < 0.3,
    )


# -------------------------------------------------------------------------------- exploration


def held_for(repeat: float, epsilon: float, steps: int, copies: int) -> tuple[Tensor, Tensor]:
    """Actions taken and held over time, int64 [steps, copies]; the greedy action is 3 of 0..3."""
    q_values = torch.arange(4.0).expand(1, copies, 4)
    noise = Noise(0, 1).uniform(Stream.EXPLORATION, 0, steps, (copies, 2))
    held, rows = torch.full((1, copies), -1), []
    for row in noise:
        action, held = held_epsilon_greedy(
            q_values, row, torch.tensor([[epsilon]]), held, torch.tensor([[repeat]])
        )
        rows.append(torch.stack([action[0], held[0]]))
    actions, helds = torch.stack(rows).unbind(1)
    return actions, helds


def test_without_repeats_held_exploration_is_epsilon_greedy():
    """Bit for bit, at every epsilon."""
    q_values = torch.arange(4.0).expand(1, 500, 4)
    for epsilon in (0.0, 0.3, 1.0):
        noise = Noise(0, 1).uniform(Stream.EXPLORATION, 0, 5, (500, 2))
        actions, _ = held_for(0.0, epsilon, 5, 500)
        for row, action in zip(noise, actions, strict=True):
            assert torch.equal(epsilon_greedy(q_values, row, torch.tensor([[epsilon]]))[0], action)


@pytest.mark.parametrize(("repeat", "epsilon"), [(0.9, 1.0), (0.9, 0.05), (0.5, 0.3)])
def test_held_actions_last_and_explore_as_often_as_said(repeat, epsilon):
    """In the long run a share epsilon / (1 - repeat + repeat epsilon) of steps is random, each
    action with equal chance, and a held action goes on with probability `repeat` or by luck."""
    _, held = held_for(repeat, epsilon, 400, 500)
    held = held[100:]
    random = (held >= 0).float().mean().item()
    assert random == pytest.approx(epsilon / (1 - repeat + repeat * epsilon), rel=0.05)
    shares = torch.bincount(held[held >= 0], minlength=4) / (held >= 0).sum()
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.03)
    before, after = held[:-1], held[1:]
    same = (after == before)[before >= 0].float().mean().item()
    assert same == pytest.approx(repeat + (1 - repeat) * epsilon / 4, abs=0.02)


def test_held_actions_are_carried_out():
    """Where nothing is held the greedy action is taken, elsewhere the held one."""
    actions, held = held_for(0.7, 0.2, 50, 200)
    assert torch.equal(actions, torch.where(held >= 0, held, 3))
    assert (held == -1).any()
    assert (held >= 0).any()


def test_each_member_holds_by_its_own_settings():
    """Epsilon and `repeat` of a member are those of a call with it alone."""
    q_values = torch.arange(4.0).expand(2, 500, 4)
    noise = Noise(0, 2).uniform(Stream.EXPLORATION, 0, 1, (500, 2))[0]
    held = torch.randint(-1, 4, (2, 500), generator=torch.Generator().manual_seed(0))
    epsilon, repeat = torch.tensor([[0.1], [0.9]]), torch.tensor([[0.8], [0.2]])
    both = held_epsilon_greedy(q_values, noise, epsilon, held, repeat)
    for i in range(2):
        own = [x[i : i + 1] for x in (q_values, noise, epsilon, held, repeat)]
        for ours, theirs in zip(both, held_epsilon_greedy(*own), strict=True):
            assert torch.equal(ours[i], theirs[0])


def test_each_copy_tosses_its_own_coin():
    """At eps 0.5 and N = 1024 the count of random actions has a deviation near 16 (trap 5)."""
    q_values = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 1024, 4)
    noise = Noise(0, 1).uniform(Stream.EXPLORATION, 0, 400, (1024, 2))
    actions = torch.stack([epsilon_greedy(q_values, u, torch.tensor([[0.5]])) for u in noise])
    explored = (actions != 0).sum((1, 2)).float()  # three of four random actions show
    assert abs(explored.mean() - 1024 * 0.375) < 3
    assert 13 < explored.std() < 18  # sqrt(1024 * 0.375 * 0.625) = 15.5


def test_epsilon_zero_is_greedy_and_one_is_uniform():
    """The two ends of the schedule; ties go to the lowest action."""
    q_values = torch.tensor([[[0.0, 2.0, 2.0], [3.0, 1.0, 0.0]]])
    noise = torch.tensor([[[0.0, 0.99], [0.0, 0.5]]])
    assert epsilon_greedy(q_values, noise, torch.tensor([[0.0]])).tolist() == [[1, 0]]
    assert epsilon_greedy(q_values, noise, torch.tensor([[1.0]])).tolist() == [[2, 1]]


@pytest.mark.parametrize("num_actions", [2, 3, 5, 7, 18, 1000])
def test_a_random_action_is_always_valid(num_actions):
    """The largest uniform number below 1 does not round up to action A."""
    q_values = torch.zeros(1, 1, num_actions)
    noise = torch.tensor([[[0.0, 1 - 2**-24]]])
    assert epsilon_greedy(q_values, noise, torch.tensor([[1.0]])).item() == num_actions - 1


def test_each_member_has_its_own_epsilon():
    """0 for one and 1 for the other, with the same draws."""
    q_values = torch.tensor([3.0, 1.0, 0.0]).expand(2, 1, 3)
    noise = torch.tensor([0.5, 0.99]).expand(2, 1, 2)
    assert epsilon_greedy(q_values, noise, torch.tensor([[0.0], [1.0]])).tolist() == [[0], [2]]


# ------------------------------------------------------------------------------------ targets


def batch_of(next_obs: Tensor, reward: float = 0.0, discount: float = 1.0) -> Batch:
    """Transitions to `next_obs` [M, B, F]."""
    m, b, _ = next_obs.shape
    return Batch(
        obs=torch.zeros_like(next_obs),
        action=torch.zeros(m, b, dtype=torch.int64),
        reward=torch.full((m, b), reward),
        next_obs=next_obs,
        discount=torch.full((m, b), discount),
    )


def linear_state(
    online: list[list[list[float]]], target: list[list[list[float]]], double_q: bool
) -> tuple[DQN, State]:
    """Networks without hidden layer or bias; weights [M, F, A]."""
    sizes = (len(online[0]), len(online[0][0]))
    dqn, state = learner(sizes, len(online), double_q=double_q)
    with torch.no_grad():
        for params, weight in ((state.params, online), (state.target_params, target)):
            params[0].copy_(torch.tensor(weight))
            params[1].zero_()
    return dqn, state


@pytest.mark.parametrize(
    ("double_q", "expected"),
    [(False, [[5.0, 4.0], [5.0, 4.0]]), (True, [[2.0, 3.0], [5.0, 3.0]])],
)
def test_bootstrap_by_hand(double_q, expected):
    """Plain: the target's largest value. Double: the target's value of the online choice."""
    online = [[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]]
    dqn, state = linear_state(online, [[[5.0, 2.0], [3.0, 4.0]]] * 2, double_q)
    states = torch.eye(2).expand(2, 2, 2)  # each row of weights is the values there
    _, target = dqn.taken_and_target(state, batch_of(states))
    assert target.tolist() == expected
    assert not target.requires_grad


def test_double_q_does_not_overestimate():
    """All actions worth 0, each network wrong by independent noise: the plain maximum of ten is
    1.54 standard deviations too high, the double estimate right on average."""
    generator = torch.Generator().manual_seed(0)
    nets = [torch.randn(1, 2_000, 10, generator=generator).tolist() for _ in range(2)]
    means = []
    for double_q in (False, True):
        dqn, state = linear_state(*nets, double_q)
        _, target = dqn.taken_and_target(state, batch_of(torch.eye(2_000)[None]))
        means.append(target.mean().item())
    assert means[0] == pytest.approx(1.5388, abs=4 * 0.587 / 2_000**0.5)
    assert means[1] == pytest.approx(0.0, abs=4 / 2_000**0.5)


@pytest.mark.parametrize("double_q", [False, True])
def test_a_time_limit_bootstraps_and_a_terminal_state_does_not(double_q):
    """Rows stored with `terminated` False count gamma times their value, whatever ended their
    episode; behind a terminal state not even an infinite value counts. Each member has its own
    gamma (trap 1)."""
    dqn, state = learner((2, 3), 2, 4, gamma=torch.tensor([[0.9], [0.5]]), double_q=double_q)
    with torch.no_grad():
        for params in (state.params, state.target_params):
            params[0].copy_(torch.tensor([[0.0, 1.0, 0.0], [4.0, 0.0, 0.0]]))
            params[1].zero_()
    next_obs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [math.inf, 0.0], [0.0, math.inf]])
    rows = Transition(
        obs=torch.zeros(2, 4, 2),
        action=torch.zeros(2, 4, dtype=torch.int64),
        reward=torch.tensor([0.5, -1.0, 0.25, 2.0]).expand(2, 4),
        next_obs=next_obs.expand(2, 4, 2),
        terminated=torch.tensor([False, False, True, True]).expand(2, 4),
    )
    dqn.replay.add_(state.replay, rows)
    batch = dqn.replay.sample(state.replay, inputs(1, dqn).rows, state.hyper.gamma)
    _, target = dqn.taken_and_target(state, batch)
    expected = torch.tensor([[1.4, 2.6, 0.25, 2.0], [1.0, 1.0, 0.25, 2.0]])
    torch.testing.assert_close(target, expected)


def test_td_error_is_target_less_value():
    """Without gradient, for the actions taken."""
    dqn, state = linear_state([[[1.0, 7.0]]], [[[5.0, 2.0]]], double_q=False)
    batch = batch_of(torch.ones(1, 1, 1), reward=0.5, discount=0.5)
    batch.obs.fill_(3.0)
    batch.action.fill_(1)
    error = dqn.td_error(state, batch)
    assert error.tolist() == [[0.5 + 2.5 - 21.0]]
    assert not error.requires_grad


# ------------------------------------------------------------------------------ gradient steps


def test_clipping_is_by_global_norm_per_member():
    """Norm after = min(norm, c), direction kept, members apart (trap 10)."""
    grads = [torch.tensor([[[3.0]], [[0.3]]]), torch.tensor([[[4.0]], [[0.4]]])]
    norm = clip_global_norm_(grads, torch.tensor([[1.0], [1.0]]))
    torch.testing.assert_close(norm, torch.tensor([5.0, 0.5]))
    torch.testing.assert_close(torch.cat(grads, 2)[:, 0], torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_clipping_leaves_zero_and_unbounded_gradients_alone():
    """A zero gradient stays zero; an infinite bound clips nothing."""
    zero, large = torch.zeros(1, 2, 2), torch.full((1, 2, 2), 1e6)
    clip_global_norm_([zero], torch.tensor([[1.0]]))
    clip_global_norm_([large], torch.tensor([[math.inf]]))
    assert torch.equal(zero, torch.zeros(1, 2, 2))
    assert torch.equal(large, torch.full((1, 2, 2), 1e6))


def test_clipping_equals_torch():
    """The same gradients as torch.nn.utils.clip_grad_norm_ on each member's parameters."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(s, generator=generator) for s in ((3, 4, 5), (3, 1, 5))]
    expected = []
    for member in range(3):
        params = [nn.Parameter(torch.zeros_like(g[member])) for g in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad[member].clone()
        nn.utils.clip_grad_norm_(params, 2.0)
        expected.append([param.grad for param in params])
    clip_global_norm_(grads, torch.full((3, 1), 2.0))
    for member in range(3):
        for grad, theirs in zip(grads, expected[member], strict=True):
            torch.testing.assert_close(grad[member], theirs)


@pytest.mark.parametrize("annealed", [False, True])
def test_adam_equals_torch(annealed):
    """200 steps of torch.optim.Adam for each member, with learning rates of their own that stay or
    fall to zero."""
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(2, 3, 4, generator=generator), torch.randn(2, 1, 4, generator=generator)]
    theirs = [[nn.Parameter(param[member].clone()) for param in ours] for member in range(2)]
    optimizers = [torch.optim.Adam(params) for params in theirs]
    adam = Adam([torch.zeros_like(p) for p in ours], [torch.zeros_like(p) for p in ours])
    for t in range(1, 201):
        rates = [rate * (1 - t / 200 if annealed else 1.0) for rate in (1e-2, 3e-3)]
        grads = tuple(torch.randn(p.shape, generator=generator) for p in ours)
        grads[0][0, 0] = 0.0  # a parameter that never gets a gradient must not turn into NaN
        step_size = torch.tensor([rate / (1 - 0.9**t) for rate in rates])
        adam_step_(adam, ours, grads, step_size, torch.tensor(1 / math.sqrt(1 - 0.999**t)))
        for member, optimizer in enumerate(optimizers):
            optimizer.param_groups[0]["lr"] = rates[member]
            for param, grad in zip(theirs[member], grads, strict=True):
                param.grad = grad[member].clone()
            optimizer.step()
    for member in range(2):
        for ours_, theirs_ in zip(ours, theirs[member], strict=True):
            torch.testing.assert_close(ours_[member], theirs_.detach(), atol=2e-6, rtol=1e-5)


def test_sync_is_a_weighted_mean():
    """target <- (1 - w) target + w online with a weight for each member, exactly the old at 0 and
    the new at 1."""
    network, weight = QNetwork((3, 4, 2)), torch.tensor([0.0, 0.02, 0.75, 1.0])
    online, target = network.init(Noise(0, 4)), network.init(Noise(5, 4))
    before = tree.clone(target)
    sync_target_(target, online, weight)
    for new, old, param in zip(target, before, online, strict=True):
        assert torch.equal(new[0], old[0])
        assert torch.equal(new[3], param[3])
        for i in (1, 2):
            expected = (1 - weight[i]) * old[i] + weight[i] * param[i]
            torch.testing.assert_close(new[i], expected, atol=1e-7, rtol=1e-6)


class PlainDQN:
    """One member in plain torch: nn.Linear, torch.optim.Adam, backward, clip_grad_norm_."""

    def __init__(self, params: list[Tensor], member: int, gamma: float, double_q: bool) -> None:
        layers: list[nn.Module] = []
        for weight, bias in zip(params[::2], params[1::2], strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[2])
            linear.load_state_dict({"weight": weight[member].T, "bias": bias[member, 0]})
            layers += [linear, nn.ReLU()]
        self.online = nn.Sequential(*layers[:-1])
        self.target = copy.deepcopy(self.online)
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=1e-3)
        self.gamma, self.double_q = gamma, double_q

    def update(self, batch: Transition, tau: float) -> tuple[float, float, float, float]:
        with torch.no_grad():
            choice = self.online if self.double_q else self.target
            best = choice(batch.next_obs).argmax(1, keepdim=True)
            next_q = self.target(batch.next_obs).gather(1, best)[:, 0]
            target = batch.reward + self.gamma * next_q * (1 - batch.terminated.float())
        q_taken = self.online(batch.obs)[range(len(target)), batch.action]
        loss = nn.functional.smooth_l1_loss(q_taken, target)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.online.parameters(), 0.5)
        self.optimizer.step()
        for new, old in zip(self.online.parameters(), self.target.parameters(), strict=True):
            old.data.mul_(1 - tau).add_(tau * new.data)
        return loss.item(), q_taken.mean().item(), target.mean().item(), norm.item()


@pytest.mark.parametrize("double_q", [False, True])
def test_update_equals_plain_torch_for_every_member(double_q):
    """300 updates of 3 members with own gammas equal three single agents in plain torch."""
    generator = torch.Generator().manual_seed(0)
    gammas = (0.5, 0.9, 0.99)
    dqn, state = learner(
        (6, 16, 16, 3), 3, 20, gamma=torch.tensor(gammas)[:, None], max_grad_norm=0.5,
        double_q=double_q,
    )  # fmt: skip
    plain = [PlainDQN(state.params, member, gamma, double_q) for member, gamma in enumerate(gammas)]
    for t in range(1, 301):
        batch = random_batch(generator, 3, 20, 6)
        tau = 0.1 if t % 3 == 0 else 0.0
        dqn.replay.add_(state.replay, batch)
        metrics = dqn.update_(state, inputs(t, dqn, sync=tau))
        expected = [
            agent.update(Transition(*(x[i] for x in batch)), tau) for i, agent in enumerate(plain)
        ]
        torch.testing.assert_close(metrics.T, torch.tensor(expected), atol=2e-4, rtol=2e-3)


def test_a_member_learns_as_if_it_were_alone():
    """Losses of member i equal those of a population of one with its seed (trap 13)."""
    batch = random_batch(torch.Generator().manual_seed(1), 4, 32, 5)

    def losses(members: slice) -> Tensor:
        count = len(range(4)[members])
        dqn, state = learner((5, 32, 3), count, 32, seed=members.start or 0)
        dqn.replay.add_(state.replay, Transition(*(x[members] for x in batch)))
        return torch.stack([dqn.update_(state, inputs(t, dqn)) for t in range(1, 201)])

    together = losses(slice(0, 4))
    for i in range(4):
        torch.testing.assert_close(
            losses(slice(i, i + 1))[..., 0], together[..., i], atol=1e-5, rtol=1e-3
        )


def test_gradients_do_not_reach_the_target_network():
    """Without synchronisation the target network stays bit for bit what it was."""
    dqn, state = learner((5, 8, 3), 1, 32, loss="squared", double_q=True)
    before = tree.clone(state)
    dqn.replay.add_(state.replay, random_batch(torch.Generator().manual_seed(1), 1, 32, 5))
    dqn.update_(state, inputs(1, dqn))
    assert all(map(torch.equal, before.target_params, state.target_params))
    assert not any(map(torch.equal, before.params, state.params))
    assert not any(param.requires_grad for param in state.target_params)


@pytest.mark.parametrize("loss", ["huber", "squared"])
def test_what_an_update_reports(loss):
    """Mean loss, mean value and mean target over each member's batch, by hand (trap 9)."""
    dqn, state = learner((2, 3), 2, 4, loss=loss, gamma=0.5)
    with torch.no_grad():
        for params in (state.params, state.target_params):
            for param in params:
                param.zero_()
    reward = torch.tensor([[0.5, 1.0, -3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    obs = torch.ones(2, 4, 2)
    rows = Transition(obs, torch.ones(2, 4).long(), reward, obs, torch.zeros(2, 4).bool())
    dqn.replay.add_(state.replay, rows)
    mean_loss, q_value, target, _ = dqn.update_(state, inputs(1, dqn))
    by_hand = {"huber": [3.125 / 4, 1.5], "squared": [10.25 / 4, 4.0]}
    assert mean_loss.tolist() == by_hand[loss]
    assert q_value.tolist() == [0.0, 0.0]
    assert target.tolist() == [-1.5 / 4, 2.0]


class Weighted(Replay):
    """Rows with weights and places, which it is told the priorities of."""

    def sample(
        self, state: ReplayState, noise: Tensor, gamma: Tensor, beta: Tensor | None = None
    ) -> Batch:
        self.beta = beta
        batch = super().sample(state, noise, gamma)
        return replace(batch, weight=torch.tensor([[0.0, 2.0, 0.5]]), index=noise)

    def update_priority_(self, state: ReplayState, index: Tensor, priority: Tensor) -> None:
        self.told = index, priority


def test_weighted_rows_count_by_their_weight_and_get_priorities():
    """Loss and gradient are means of weight times loss; priorities are |target - Q| before the
    step; beta arrives as [M, 1]."""
    dqn, state = learner((2, 3), 1, 3, loss="squared")
    replay = Weighted(3, 1, 3, dqn.env.example_obs(), 3)
    dqn = replace(dqn, replay=replay)
    with torch.no_grad():
        for params in (state.params, state.target_params):
            for param in params:
                param.zero_()
    obs, reward = torch.ones(1, 3, 2), torch.tensor([[9.0, 1.0, -2.0]])
    replay.add_(
        state.replay,
        Transition(obs, torch.zeros(1, 3).long(), reward, obs, torch.ones(1, 3).bool()),
    )
    metrics = dqn.update_(state, inputs(1, dqn)._replace(beta=torch.tensor([0.4])))
    assert replay.beta.tolist() == [[pytest.approx(0.4)]]
    assert metrics[0].item() == pytest.approx((2 * 1 + 0.5 * 4) / 3)
    index, priority = replay.told
    assert index.tolist() == [[0, 1, 2]]
    assert priority.tolist() == [[9.0, 1.0, 2.0]]
    # d loss / d q = 2 w (q - y) / 3, for one action's bias and two weights of the same input
    slope = 2 * (2 * -1.0 + 0.5 * 2.0) / 3
    assert metrics[3].item() == pytest.approx(abs(slope) * 3**0.5)


# ------------------------------------------------------------------------------- vector steps


Inputs = tuple[StepInputs, UpdateInputs, tuple[int, ...]]


def training_and_chunks(
    args: Args, env: TensorEnv | None = None, num_chunks: int = 1, until: int = 1_000
) -> tuple[Training, list[Inputs]]:
    """A run that has got to global_step `until` or a little further, and its next chunks."""
    training, chunks = setup(args, env or LineWorld(slip_prob=0.05)), list[Inputs]()
    for chunk, steps, updates in training.inputs():
        if chunk.before >= until:
            chunks.append((steps, updates, chunk.update_counts))
        else:
            training.runner(steps, updates, chunk.update_counts)
        if len(chunks) == num_chunks:
            return training, chunks
    raise AssertionError


def reachable(value: Any, seen: dict[int, Any]) -> list[Tensor]:
    """All tensors that an object holds, however deep."""
    if id(value) in seen:
        return []
    seen[id(value)] = value
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        inner = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, field.name) for field in dataclasses.fields(value)]
        inner.append(vars(value))
    elif hasattr(value, "__dict__") and not isinstance(value, (type, Callable)):
        inner = list(vars(value).values())
    else:
        return []
    return [tensor for item in inner for tensor in reachable(item, seen)]


VARIANTS = [
    {"num_seeds": 2},
    {"eps_repeat": 0.7, "num_seeds": 3},
    {"double_q": True, "env_id": "CartPole-v1"},
    {"gradient_steps": 3, "train_freq": 50, "tau": 0.3},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_everything_that_a_vector_step_changes_is_in_the_state(variant):
    """Two chunks on a clone, and again on the state set back to where it was, give the same, bit
    for bit; nothing that the algorithm itself holds changes."""
    args = replace(SHORT, **variant)
    training, chunks = training_and_chunks(args, make_env(args.env_id), num_chunks=2)
    dqn, state, start = training.dqn, training.state, tree.clone(training.state)
    held = reachable(dqn, {})
    before = tree.clone(held)
    assert len(held) >= 2

    def run(state: State) -> list[Tensor]:
        records = [tree.clone(chunk_(dqn, state, *chunk)) for chunk in chunks]
        return tree.leaves([state, records])

    assert sum(sum(counts) for *_, counts in chunks) >= 2
    first = run(tree.clone(start))
    second = tree.clone(run(state))
    tree.copy_(state, start)
    third = run(state)
    for others in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first, others, strict=True))
    assert not all(map(torch.equal, tree.leaves(state), tree.leaves(start)))
    assert all(a is b for a, b in zip(reachable(dqn, {}), held, strict=True))
    assert all(map(torch.equal, before, held))


@pytest.mark.parametrize("variant", [{}, {"eps_repeat": 0.7}, {"double_q": True}], ids=str)
def test_a_member_of_the_state_is_the_state_of_its_single_run(variant):
    """After some chunks, bit for bit: member i of three has the state of a run of seed i alone,
    moments, env copies and replay included; no two members are equal (trap 13)."""

    def state_of(seed: int, num_seeds: int) -> State:
        args = replace(SHORT, seed=seed, num_seeds=num_seeds, **variant)
        return training_and_chunks(args)[0].state

    together = state_of(5, 3)
    parts = [tree.member(together, i, 3) for i in range(3)]
    assert (together.held is not None) == ("eps_repeat" in variant)
    assert together.adam.square[0].any()
    for i, part in enumerate(parts):
        for ours, theirs in zip(*map(tree.leaves, (part, state_of(5 + i, 1))), strict=True):
            assert ours.shape == theirs.shape
            assert torch.equal(ours, theirs)
        assert not torch.equal(part.params[0], parts[i - 1].params[0])
        assert not torch.equal(part.replay.rows.obs, parts[i - 1].replay.rows.obs)


def test_a_member_draws_and_learns_as_the_single_run_of_its_seed():
    """Draws equal exactly, losses within float32 rounding for 200 updates; members differ (13)."""

    def losses(seed: int, num_seeds: int) -> tuple[Tensor, list[Tensor]]:
        args = replace(
            SHORT, seed=seed, num_seeds=num_seeds, learning_starts=0, total_timesteps=3_300
        )
        training, records, drawn = setup(args, LineWorld(slip_prob=0.05)), [], []
        for chunk, steps, updates in training.inputs():
            records.append(training.runner(steps, updates, chunk.update_counts).updates)
            step = steps.env_step.unflatten(1, (num_seeds, -1))
            drawn.append([x.movedim(1, 0) for x in (steps.explore, step, updates.rows)])
        return torch.cat(records)[:200], [torch.cat(t, 1) for t in zip(*drawn, strict=True)]

    together, draws = losses(5, 3)
    assert len(together) == 200
    for i in range(3):
        alone, own_draws = losses(5 + i, 1)
        for ours, theirs in zip(draws, own_draws, strict=True):
            assert torch.equal(ours[i], theirs[0])
        torch.testing.assert_close(together[..., i], alone[..., 0], rtol=2e-3, atol=2e-5)
        assert not torch.equal(together[..., i], together[..., (i + 1) % 3])


class NoHostReads(TorchDispatchMode):
    """Raises where a tensor's value reaches the host, or where a shape depends on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in func.name() for name in self.FORBIDDEN):
            raise AssertionError(f"host read: {func.name()}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_chunk_reads_nothing_on_the_host(variant):
    """No value of a tensor is asked for in act, step, store, sample, update and sync."""
    args = replace(SHORT, **variant)
    training, [chunk] = training_and_chunks(args, make_env(args.env_id))
    with NoHostReads():
        record = chunk_(training.dqn, training.state, *chunk)
    assert len(record.updates) > 0
    with pytest.raises(AssertionError, match="host read"), NoHostReads():
        record.updates.sum().item()


def test_the_state_keeps_its_addresses():
    """A chunk writes in place; a captured graph goes on reading where the tensors were."""
    training, [chunk] = training_and_chunks(replace(SHORT, eps_repeat=0.5))
    leaves = tree.leaves(training.state)
    before, values = [t.data_ptr() for t in leaves], tree.clone(leaves)
    chunk_(training.dqn, training.state, *chunk)
    assert [t.data_ptr() for t in tree.leaves(training.state)] == before
    assert len(set(before)) == len(before)  # memory of its own for each
    changed = [not torch.equal(a, b) for a, b in zip(values, leaves, strict=True)]
    assert sum(changed) > 20


@pytest.mark.parametrize("num_envs", [1, 1_024, 2_500, 20_000])
def test_values_of_many_copies_are_those_of_each(num_envs):
    """Whatever blocks a CPU takes them in: order, members and shape are those of one product."""
    args = replace(SHORT, num_envs=num_envs, num_seeds=2, buffer_size=max(num_envs, 1_000))
    training = setup(replace(args, total_timesteps=10**6))
    dqn, state = training.dqn, training.state
    state.env.obs.random_(0, 15)
    obs = dqn.by_member(state.env.obs)
    with torch.no_grad():
        table = training.q_net(dqn.env.features(torch.arange(15).expand(2, -1)))
        values = dqn.q_values(state)
    assert values.shape == (2, num_envs, 2)
    expected = table.gather(1, obs.long()[..., None].expand(-1, -1, 2))
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


class SharedState(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class OneTensorTwice(TensorEnv):
    """Hands out one tensor, and an expanded one, as several at its start."""

    max_steps: int = 3
    num_actions: ClassVar[int] = 2

    def reset(self, noise: Tensor) -> SharedState:
        same = torch.zeros(1, device=noise.device).expand(len(noise))
        return SharedState(same, same)

    def step(self, state: SharedState, action: Tensor, noise: Tensor) -> Any:
        state = SharedState(state.first + 1 + action, state.second - 1)
        return state, state.first, torch.zeros_like(action).bool()

    def observe(self, state: SharedState) -> Tensor:
        return torch.stack(state, -1)


@pytest.mark.parametrize("env", [LineWorld(slip_prob=0.3, max_steps=3), OneTensorTwice()])
def test_replay_holds_what_the_environment_did(env):
    """Transitions of the first vector steps, played again from the carried state by hand."""
    args = replace(SHORT, num_envs=8, num_seeds=2, batch_size=4, learning_starts=1_000)
    training = setup(args, env)
    dqn, state = training.dqn, training.state
    chunk, steps, updates = next(training.inputs())
    vector, expected = tree.clone(state.env), []
    for k in range(chunk.num_steps):
        q_values = training.q_net(env.features(dqn.by_member(vector.obs)))
        explore = steps.explore[k, ..., 0] < steps.epsilon[k][:, None]
        action = torch.where(explore, (steps.explore[k, ..., 1] * 2).long(), q_values.argmax(-1))
        obs = vector.obs
        vector, outcome = env.vector_step(
            vector, action.flatten(), steps.env_step[k], steps.env_reset[k]
        )
        expected.append(
            (obs, action.flatten(), outcome.reward, outcome.next_obs, outcome.terminated)
        )
    chunk_(dqn, state, steps, updates, chunk.update_counts)
    size = chunk.num_steps * 8
    assert state.replay.size.tolist() == [[size]] * 2
    for i, stored in enumerate(dqn.replay.by_member(state.replay)):
        ours = torch.cat([dqn.by_member(row[i]) for row in expected], 1)
        assert torch.equal(stored[:, :size], ours.to(stored.dtype))


def test_held_actions_end_with_the_episode():
    """With actions that last for ever and no new ones but at the start: within an episode all
    actions are the same, from one episode to the next they differ; chunks change nothing."""
    args = replace(SHORT, eps_repeat=0.999, eps_end=1.0, gradient_steps=0, num_envs=4)
    runs = []
    for chunk_steps in (1, 8):
        env = LineWorld(max_steps=10, n_states=30)
        training = setup(replace(args, chunk_steps=chunk_steps), env)
        for _ in training.chunks():
            pass
        stored = training.dqn.replay.by_member(training.state.replay).action
        runs.append(stored[0, :4_000].view(100, 10, 4))  # episode, step, copy
    assert torch.equal(*runs)
    held = (runs[0] == runs[0][:, :1]).all(1).float().mean().item()
    assert held > 0.97
    assert 0.4 < (runs[0][1:, 0] == runs[0][:-1, 0]).float().mean().item() < 0.6


def test_example_inputs_have_the_form_of_real_ones():
    """Shapes and dtypes of one vector step's and one gradient step's, for whoever traces them."""
    training, [(steps, updates, _)] = training_and_chunks(replace(SHORT, num_seeds=2))
    examples = training.dqn.example_inputs(torch.device("cpu"))
    for real, example in zip((steps, updates), examples, strict=True):
        for ours, theirs in zip(real, example, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert (ours[0].shape, ours.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.gpu
def test_a_chunk_does_not_synchronise_with_the_gpu(no_synchronisation):
    """CUDA's own sync-debug mode finds nothing in a chunk."""
    args = replace(SHORT, num_envs=64, device="cuda")
    training = setup(args, LineWorld(slip_prob=0.05))
    for chunk, steps, updates in training.inputs():
        with no_synchronisation():
            chunk_(training.dqn, training.state, steps, updates, chunk.update_counts)
