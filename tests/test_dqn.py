"""Deep Q-learning against hand-computed numbers and independent implementations."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dqn_fast.agent import (
    Adam,
    UpdateSchedule,
    bootstrap_value,
    clip_global_norm_,
    epsilon_greedy,
    held_epsilon_greedy,
    sync_target_,
    td_loss,
    td_target,
    update_,
)
from dqn_fast.networks import QNetwork
from dqn_fast.noise import Noise, Stream
from dqn_fast.replay import Transition


def schedule(t: int, rate: float = 1e-3, sync: float = 0.0) -> UpdateSchedule:
    """Schedule of gradient step t, counted from 1."""
    values = (rate / (1 - 0.9**t), 1 / math.sqrt(1 - 0.999**t), sync)
    return UpdateSchedule(*(torch.tensor(value, dtype=torch.float32) for value in values))


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


def test_td_target_by_hand():
    """Terminated cuts the bootstrap, nothing else does; each member has its own gamma."""
    next_value = torch.tensor([[3.0, 5.0], [3.0, 5.0]])
    reward = torch.tensor([[0.5, -1.0], [0.5, -1.0]])
    terminated = torch.tensor([[False, True], [True, False]])
    target = td_target(next_value, reward, terminated, torch.tensor([[0.9], [0.5]]))
    torch.testing.assert_close(target, torch.tensor([[3.2, -1.0], [0.5, 1.5]]))


def test_td_target_ignores_a_diverged_value_behind_the_end():
    """0 times infinity is not a number; behind a terminal state nothing is looked at."""
    next_value = torch.full((1, 1), math.inf)
    target = td_target(next_value, torch.ones(1, 1), torch.ones(1, 1).bool(), torch.tensor([[0.9]]))
    assert target.item() == 1.0


def held_for(repeat: float, epsilon: float, steps: int, copies: int) -> tuple[Tensor, Tensor]:
    """Actions and what is held over time, int64 [steps, copies]; the greedy action is 3 of 0..3."""
    q_values = torch.arange(4.0).expand(1, copies, 4)
    noise = Noise(0, 1).uniform(Stream.EXPLORATION, 0, steps, (copies, 2))
    held, rows = torch.full((1, copies), -1), []
    for row in noise:
        action, held = held_epsilon_greedy(
            q_values, row, torch.tensor(epsilon), held, torch.tensor(repeat)
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
            assert torch.equal(epsilon_greedy(q_values, row, torch.tensor(epsilon))[0], action)


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


def test_what_is_held_is_what_is_done():
    """Where nothing is held the greedy action is taken, elsewhere the held one."""
    actions, held = held_for(0.7, 0.2, 50, 200)
    assert torch.equal(actions, torch.where(held >= 0, held, 3))
    assert (held == -1).any()
    assert (held >= 0).any()


def linear_net(weight: list[list[list[float]]]) -> QNetwork:
    """A network without hidden layer or bias; weight [M, F, A]."""
    q_net = QNetwork((len(weight[0]), len(weight[0][0])), len(weight))
    with torch.no_grad():
        q_net.layers[0][0].copy_(torch.tensor(weight))
    return q_net


def test_bootstrap_value_by_hand():
    """Plain: the target's largest value. Double: the target's value of the online choice."""
    online = linear_net([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    target = linear_net([[[5.0, 2.0], [3.0, 4.0]], [[5.0, 2.0], [3.0, 4.0]]])
    states = torch.eye(2).expand(2, 2, 2)  # what each row of weights says is the value there
    plain = bootstrap_value(online, target, states, double_q=False)
    double = bootstrap_value(online, target, states, double_q=True)
    assert plain.tolist() == [[5.0, 4.0], [5.0, 4.0]]
    assert double.tolist() == [[2.0, 3.0], [5.0, 3.0]]


def test_double_q_does_not_overestimate():
    """All actions worth 0, each network wrong by independent noise: the plain maximum of ten is
    1.54 standard deviations too high, the double estimate right on average."""
    generator = torch.Generator().manual_seed(0)
    nets = [linear_net(torch.randn(1, 2_000, 10, generator=generator).tolist()) for _ in range(2)]
    states = torch.eye(2_000)[None]
    plain, double = (bootstrap_value(*nets, states, double_q=flag) for flag in (False, True))
    assert plain.mean().item() == pytest.approx(1.5388, abs=4 * 0.587 / 2_000**0.5)
    assert double.mean().item() == pytest.approx(0.0, abs=4 / 2_000**0.5)


@pytest.mark.parametrize("kind", ["huber", "squared"])
def test_td_loss_equals_numpy(kind):
    """Mean over the batch, one value per member (trap 9)."""
    q, y = np.random.default_rng(0).normal(size=(2, 3, 5)) * 2
    d = np.abs(q - y)
    elementwise = d**2 if kind == "squared" else np.where(d < 1, d**2 / 2, d - 0.5)
    loss = td_loss(torch.tensor(q), torch.tensor(y), kind)
    np.testing.assert_allclose(loss, elementwise.mean(1))


def test_td_loss_refuses_shapes_that_would_broadcast():
    """(B,) against (B, 1) is an error, not a B x B table (trap 9)."""
    with pytest.raises(ValueError, match="differ"):
        td_loss(torch.zeros(1, 5), torch.zeros(1, 5, 1), "huber")


def test_each_copy_tosses_its_own_coin():
    """At eps 0.5 and N = 1024 the count of random actions has a deviation near 16 (trap 5)."""
    q_values = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 1024, 4)
    noise = Noise(0, 1).uniform(Stream.EXPLORATION, 0, 400, (1024, 2))
    actions = torch.stack([epsilon_greedy(q_values, u, torch.tensor(0.5)) for u in noise])
    explored = (actions != 0).sum((1, 2)).float()  # three of four random actions show
    assert abs(explored.mean() - 1024 * 0.375) < 3
    assert 13 < explored.std() < 18  # sqrt(1024 * 0.375 * 0.625) = 15.5


def test_epsilon_zero_is_greedy_and_one_is_uniform():
    """The two ends of the schedule; ties go to the lowest action."""
    q_values = torch.tensor([[[0.0, 2.0, 2.0], [3.0, 1.0, 0.0]]])
    noise = torch.tensor([[[0.0, 0.99], [0.0, 0.5]]])
    assert epsilon_greedy(q_values, noise, torch.tensor(0.0)).tolist() == [[1, 0]]
    assert epsilon_greedy(q_values, noise, torch.tensor(1.0)).tolist() == [[2, 1]]


@pytest.mark.parametrize("num_actions", [2, 3, 5, 7, 18, 1000])
def test_a_random_action_is_always_valid(num_actions):
    """The largest uniform number below 1 does not round up to action A."""
    q_values = torch.zeros(1, 1, num_actions)
    noise = torch.tensor([[[0.0, 1 - 2**-24]]])
    assert epsilon_greedy(q_values, noise, torch.tensor(1.0)).item() == num_actions - 1


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
    """200 steps of torch.optim.Adam, with a constant and a falling step size down to zero."""
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(2, 3, 4, generator=generator), torch.randn(2, 1, 4, generator=generator)]
    theirs = [nn.Parameter(param.clone()) for param in ours]
    optimizer = torch.optim.Adam(theirs, lr=1e-2)
    adam = Adam.zeros(ours)
    for t in range(1, 201):
        rate = 1e-2 * (1 - t / 200) if annealed else 1e-2
        grads = tuple(torch.randn(p.shape, generator=generator) for p in ours)
        grads[0][0, 0] = 0.0  # a parameter that never gets a gradient must not turn into NaN
        adam.step_(ours, grads, schedule(t, rate))
        optimizer.param_groups[0]["lr"] = rate
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_, theirs_.detach(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.02, 0.75, 1.0])
def test_sync_is_a_weighted_mean(weight):
    """target <- (1 - w) target + w online, exactly the old at 0 and the new at 1."""
    online, target = (
        QNetwork((3, 4, 2), 2).init_(Noise(0, 2)),
        QNetwork((3, 4, 2), 2).init_(Noise(5, 2)),
    )
    before = copy.deepcopy(target)
    sync_target_(target, online, torch.tensor(weight))
    for new, old, param in zip(target.params, before.params, online.params, strict=True):
        expected = {0.0: old, 1.0: param}.get(weight, (1 - weight) * old + weight * param)
        exact = weight in (0.0, 1.0)
        torch.testing.assert_close(
            new, expected, atol=0.0 if exact else 1e-7, rtol=0.0 if exact else 1e-6
        )


class PlainDQN:
    """One member in plain torch: nn.Linear, torch.optim.Adam, backward, clip_grad_norm_."""

    def __init__(self, q_net: QNetwork, member: int, gamma: float, double_q: bool) -> None:
        layers: list[nn.Module] = []
        for weight, bias in q_net.layers:
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
    q_net = QNetwork((6, 16, 16, 3), 3).init_(Noise(0, 3))
    target_net = copy.deepcopy(q_net).requires_grad_(False)
    adam = Adam.zeros(q_net.params)
    plain = [PlainDQN(q_net, member, gamma, double_q) for member, gamma in enumerate(gammas)]
    for t in range(1, 301):
        batch = random_batch(generator, 3, 20, 6)
        tau = 0.1 if t % 3 == 0 else 0.0
        metrics = update_(
            q_net,
            target_net,
            adam,
            batch,
            torch.tensor(gammas)[:, None],
            torch.full((3, 1), 0.5),
            "huber",
            double_q,
            schedule(t, sync=tau),
        )
        expected = [
            agent.update(Transition(*(x[i] for x in batch)), tau) for i, agent in enumerate(plain)
        ]
        torch.testing.assert_close(metrics.T, torch.tensor(expected), atol=2e-4, rtol=2e-3)


def test_a_member_learns_as_if_it_were_alone():
    """Losses of member i equal those of a population of one with its seed (trap 13)."""
    batch = random_batch(torch.Generator().manual_seed(1), 4, 32, 5)
    settings = (torch.full((4, 1), 0.99), torch.full((4, 1), 10.0))

    def losses(members: slice) -> Tensor:
        count = len(range(4)[members])
        q_net = QNetwork((5, 32, 3), count).init_(Noise(members.start or 0, count))
        target_net = copy.deepcopy(q_net).requires_grad_(False)
        adam = Adam.zeros(q_net.params)
        own = Transition(*(x[members] for x in batch))
        rows = [
            update_(
                q_net,
                target_net,
                adam,
                own,
                *(s[members] for s in settings),
                "huber",
                False,
                schedule(t),
            )
            for t in range(1, 201)
        ]
        return torch.stack(rows)

    together = losses(slice(0, 4))
    for i in range(4):
        torch.testing.assert_close(
            losses(slice(i, i + 1))[..., 0], together[..., i], atol=1e-5, rtol=1e-3
        )


def test_gradients_do_not_reach_the_target_network():
    """Without synchronisation the target network stays bit for bit what it was."""
    q_net = QNetwork((5, 8, 3), 1).init_(Noise(0, 1))
    target_net = copy.deepcopy(q_net).requires_grad_(False)
    before = [param.clone() for param in target_net.params]
    batch = random_batch(torch.Generator().manual_seed(1), 1, 32, 5)
    ones = torch.ones(1, 1)
    adam = Adam.zeros(q_net.params)
    update_(q_net, target_net, adam, batch, ones, ones, "squared", True, schedule(1))
    assert all(torch.equal(a, b) for a, b in zip(before, target_net.params, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, q_net.params, strict=True))
