"""Deep Q-learning: everything that happens in one vector step.

    act_         epsilon-greedy actions of all env copies
    step_envs    one step of their environments
    store_       the transitions go into replay
    learn_       U gradient steps: sample, target, loss, gradients, clip, Adam, target network
    vector_step_ these four in turn

M members learn side by side: independent agents with N env copies each, E = M * N; M is the first
axis of their tensors. Random numbers and schedules are inputs. Nothing is read on the host. Every
tensor that outlives the step is part of `State` and is written in place. So an engine may run these
functions as they are, compiled, or captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dqn_fast import tree
from dqn_fast.algorithm import StepInputs, StepRecord, UpdateInputs
from dqn_fast.code import digest_of
from dqn_fast.envs import EnvError, Outcome, TensorEnv, VectorState
from dqn_fast.heads import Head, describe_head
from dqn_fast.networks import Params, QNetwork
from dqn_fast.noise import Noise, Stream
from dqn_fast.plan import ADAM_BETAS
from dqn_fast.replay import Batch, Replay, ReplayState, Transition

ADAM_EPS = 1e-8

# ------------------------------------------------------------------------------------------ state


class Hyper(NamedTuple):
    """Settings that a vector step reads and in which members may differ, float32 [M, 1] each.

    Attributes:
        gamma: discount per env step, in [0, 1].
        max_grad_norm: global norm to which gradients are clipped; infinity: no clipping.
        eps_repeat: probability that a random action is repeated for one more step, in [0, 1).
    """

    gamma: Tensor
    max_grad_norm: Tensor
    eps_repeat: Tensor


class Adam(NamedTuple):
    """Moments of Adam, one tensor [M, ...] per parameter; elementwise, so members do not mix."""

    mean: list[Tensor]
    square: list[Tensor]


class State(NamedTuple):
    """Everything that is carried from one vector step to the next.

    The first axis of every tensor is the member's, [M, ...] or [M * rows, ...], so `tree.member`
    gives the state of a run with one member. Every tensor keeps its address.

    Attributes:
        params: of the online network.
        target_params: of the target network.
        adam: moments.
        env: of the env copies, [E, ...].
        replay: memory.
        held: random action that each copy is repeating, int64 [M, N], -1 for none; None if random
            actions last one step.
        hyper: settings.
    """

    params: Params
    target_params: Params
    adam: Adam
    env: VectorState
    replay: ReplayState
    held: Tensor | None
    hyper: Hyper


@dataclass(frozen=True)
class QFunction:
    """Q-values of M members: a network, its parameters and its head."""

    network: QNetwork
    head: Head
    params: Params

    def __call__(self, features: Tensor) -> Tensor:
        """Q-values [M, B, A] of features [M, B, F], float32."""
        return self.head.values(self.network(self.params, features))

    @property
    def num_members(self) -> int:
        return len(self.params[0])

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def parameters(self) -> list[Tensor]:
        """The parameters, float32 [M, ...] each."""
        return self.params

    def named(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return self.network.named(self.params)


# ----------------------------------------------------------------------------- one vector step

ACT_BLOCK, MOST_BLOCKS = 1_024, 16
"""A CPU computes Q-values for ACT_BLOCK copies at a time, so that hidden activations stay in its
cache: 11 ms instead of 33 ms for 16,384 copies. More than MOST_BLOCKS blocks would make the
compiled function too long."""


@dataclass(frozen=True)
class DQN:
    """Deep Q-learning of M members with N env copies each; holds no tensor that changes.

    Attributes:
        env: environment.
        network: describes the Q-network.
        head: meaning of the network's outputs.
        replay: how transitions are stored and sampled.
        num_members, num_envs: M and N.
        batch_size: B.
        double_q: whether the online network selects the action that the target network evaluates.
            Then noise in one does not become value in the other; van Hasselt, Guez & Silver (2016).
        holds_actions: whether random actions may last longer than one step.
        in_blocks: whether a CPU computes Q-values for ACT_BLOCK copies at a time.
    """

    env: TensorEnv
    network: QNetwork
    head: Head
    replay: Replay
    num_members: int
    num_envs: int
    batch_size: int
    double_q: bool = False
    holds_actions: bool = False
    in_blocks: bool = True

    @property
    def on_host(self) -> bool:
        return self.env.on_host

    def identity(self) -> Any | None:
        """JSON values that these functions follow from, with the sources of this package; None:
        they follow from other sources too."""
        env = self.env.identity()
        parts = (self.network, self.head, self.replay)
        kinds = [kind for part in (self, self.env, *parts) for kind in type(part).__mro__]
        modules = {kind.__module__ for kind in kinds if kind.__module__.startswith("dqn_fast.")}
        if env is None or not all(type(p).__module__ in modules for p in parts):
            return None
        # A program may have replaced a function, as in `dqn_fast.dqn.epsilon_greedy = mine`.
        code = digest_of({*modules, *(f"dqn_fast.{name}" for name in ("noise", "plan", "tree"))})
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.type in ("int", "bool")}
        network, head = self.network, describe_head(self.head)
        replay = type(self.replay).__name__, self.replay.capacity
        return own, env, network.sizes, network.num_outputs, head, replay, code

    def one_member(self) -> DQN:
        """The same for one member, with its copies as a whole."""
        return replace(self, num_members=1, replay=self.replay.one_member(), in_blocks=False)

    @torch.no_grad()
    def init(self, noise: Noise, hyper: Hyper) -> State:
        """Fresh networks and env copies, and an empty replay, on the device of `noise`."""
        shape = (self.num_members, self.num_envs)
        draws = noise.uniform(Stream.ENV_RESET, 0, 1, (shape[1], self.env.reset_noise_dim))[0]
        params = self.network.init(noise)
        moments = [torch.zeros_like(param, requires_grad=False) for param in params]
        return State(
            params=params,
            target_params=[param.detach().clone() for param in params],
            adam=Adam(moments, tree.clone(moments)),
            # Each tensor gets its own memory, because a reset may return one tensor twice.
            env=tree.clone(self.env.vector_reset(draws.flatten(0, 1))),
            replay=self.replay.init(),
            held=torch.full(shape, -1, device=noise.device) if self.holds_actions else None,
            hyper=hyper,
        )

    @torch.no_grad()
    def begin_episodes_(self, state: State, noise: Noise, step: int) -> list[dict[str, Any]]:
        """Begin new episodes in all copies of an environment on the host.

        Args:
            state: written.
            noise: of the members.
            step: vector steps so far; their resets on the host read no noise.

        Returns:
            Episodes that are cut off here: copy, episode_length and episode_return of each.
        """
        elapsed, returns = state.env.elapsed.tolist(), state.env.episode_return.tolist()
        shape = (self.num_envs, self.env.reset_noise_dim)
        draws = noise.uniform(Stream.ENV_RESET, step, 1, shape)[0]
        state.env.copy_(self.env.vector_reset(draws.flatten(0, 1)))
        return [
            {"copy": i, "episode_length": elapsed[i], "episode_return": returns[i]}
            for i in range(len(elapsed))
            if elapsed[i] > 0
        ]

    def draw(
        self,
        noise: Noise,
        num_steps: int,
        num_updates: int,
        first_step: int | Tensor,
        first_update: int | Tensor,
    ) -> tuple[Tensor, ...]:
        """Random numbers of vector steps first_step .. and gradient steps first_update ..:
        explore, env_step and env_reset of `StepInputs`, rows of `UpdateInputs`."""
        n, env = self.num_envs, self.env
        uniform = partial(noise.uniform, count=num_steps)
        return (
            uniform(Stream.EXPLORATION, first_step, shape=(n, 2)),
            uniform(Stream.ENV_STEP, first_step, shape=(n, env.step_noise_dim)).flatten(1, 2),
            uniform(Stream.ENV_RESET, first_step + 1, shape=(n, env.reset_noise_dim)).flatten(1, 2),
            noise.integers(Stream.REPLAY, first_update, num_updates, (self.batch_size,)),
        )

    def example_inputs(self, device: torch.device) -> tuple[StepInputs, UpdateInputs]:
        """Inputs of one vector step and one gradient step, all 0, with their shapes and dtypes."""
        (m, n), env = (self.num_members, self.num_envs), self.env
        zeros = partial(torch.zeros, device=device)
        step = StepInputs(
            explore=zeros(m, n, 2),
            env_step=zeros(m * n, env.step_noise_dim),
            env_reset=zeros(m * n, env.reset_noise_dim),
            epsilon=zeros(m),
        )
        rows = zeros(m, self.batch_size, dtype=torch.int64)
        beta = zeros(m) if self.replay.weighted else None
        return step, UpdateInputs(rows, zeros(m), zeros(()), zeros(m), beta)

    def q_function(self, state: State) -> QFunction:
        """The online network's Q-values."""
        return QFunction(self.network, self.head, state.params)

    def by_member(self, tensor: Tensor) -> Tensor:
        """[E, ...] as [M, N, ...]."""
        return tensor.view(self.num_members, self.num_envs, *tensor.shape[1:])

    def q_values(self, state: State) -> Tensor:
        """Q-values of the current observations, float32 [M, N, A]."""
        obs = self.by_member(state.env.obs)
        size = self.num_envs
        if obs.device.type == "cpu" and self.in_blocks:
            size = max(min(size, ACT_BLOCK), -(-size // MOST_BLOCKS))
        blocks = (self.env.features(block) for block in obs.split(size, 1))
        values = [self.head.values(self.network(state.params, block)) for block in blocks]
        return values[0] if len(values) == 1 else torch.cat(values, 1)

    @torch.no_grad()
    def act_(self, state: State, explore: Tensor, epsilon: Tensor) -> Tensor:
        """Epsilon-greedy actions of all copies, int64 [E]; explore [M, N, 2], epsilon [M]."""
        q_values = self.q_values(state)
        if state.held is None:
            return epsilon_greedy(q_values, explore, epsilon.unsqueeze(-1)).flatten()
        # A new episode never continues the held action of the previous one.
        held = torch.where(self.by_member(state.env.elapsed) > 0, state.held, -1)
        action, held = held_epsilon_greedy(
            q_values, explore, epsilon.unsqueeze(-1), held, state.hyper.eps_repeat
        )
        state.held.copy_(held)
        return action.flatten()

    @torch.no_grad()
    def step_envs(
        self, state: State, action: Tensor, step_noise: Tensor, reset_noise: Tensor
    ) -> tuple[VectorState, Outcome]:
        """One step of all copies; see `TensorEnv.vector_step`."""
        try:
            return self.env.vector_step(state.env, action, step_noise, reset_noise)
        except EnvError:
            raise
        except Exception as error:
            raise EnvError(f"{type(self.env).__name__}: {type(error).__name__}: {error}") from error

    def store_(self, state: State, action: Tensor, outcome: Outcome) -> None:
        """Write the transitions from `state.env` into replay."""
        rows = Transition(
            state.env.obs, action, outcome.reward, outcome.next_obs, outcome.terminated
        )
        valid = None if outcome.valid is None else self.by_member(outcome.valid)
        self.replay.add_(state.replay, Transition(*map(self.by_member, rows)), valid)

    def learn_(self, state: State, updates: list[UpdateInputs]) -> list[Tensor]:
        """Take gradient steps; UPDATE_METRICS of each, float32 [4, M]."""
        return [self.update_(state, inputs) for inputs in updates]

    def update_(self, state: State, inputs: UpdateInputs) -> Tensor:
        """One gradient step of every member on its own batch, then the target's synchronisation.

        The loss is the sum over members of each member's mean, so one backward pass gives every
        member its own gradient.

        Returns:
            Loss, mean Q(s, a), mean target and gradient norm before clipping: float32 [4, M].
        """
        beta = None if inputs.beta is None else inputs.beta[:, None]
        batch = self.replay.sample(state.replay, inputs.rows, state.hyper.gamma, beta)
        taken, target = self.taken_and_target(state, batch)
        loss = self.head.loss(taken, target)
        mean_loss = (loss if batch.weight is None else batch.weight * loss).mean(-1)

        grads = torch.autograd.grad(mean_loss.sum(), state.params)
        grad_norm = clip_global_norm_(grads, state.hyper.max_grad_norm)
        adam_step_(state.adam, state.params, grads, inputs.step_size, inputs.inverse_correction)
        sync_target_(state.target_params, state.params, inputs.sync)
        taken = taken.detach()
        if batch.index is not None:  # rows have priorities
            priority = self.head.priority(taken, target)
            self.replay.update_priority_(state.replay, batch.index, priority)
        q_taken, td_target = self.head.taken_values(taken), self.head.target_values(target)
        return torch.stack([mean_loss.detach(), q_taken.mean(-1), td_target.mean(-1), grad_norm])

    def taken_and_target(self, state: State, batch: Batch) -> tuple[Tensor, Tensor]:
        """Outputs of the actions taken, as `Head.take`, and their targets.

        The successor's action is argmax_a Q_target(s', a); with `double_q` argmax_a Q(s', a).
        """
        with torch.no_grad():
            next_obs = self.env.features(batch.next_obs)
            next_outputs = self.network(state.target_params, next_obs)
            if self.double_q:
                chosen = self.head.values(self.network(state.params, next_obs)).argmax(-1)
                best = self.head.take(next_outputs, chosen)
            else:
                best = self.head.best(next_outputs)
            target = self.head.target(best, batch.reward, batch.discount)
        outputs = self.network(state.params, self.env.features(batch.obs))
        return self.head.take(outputs, batch.action), target

    @torch.no_grad()
    def td_error(self, state: State, batch: Batch) -> Tensor:
        """Expected return of the target minus Q(s, a), float32 [M, B]."""
        taken, target = self.taken_and_target(state, batch)
        return self.head.target_values(target) - self.head.taken_values(taken)

    def vector_step_(
        self,
        state: State,
        inputs: StepInputs,
        updates: list[UpdateInputs],
        act_: Callable[..., Tensor] | None = None,
        learn_: Callable[..., list[Tensor]] | None = None,
    ) -> StepRecord:
        """Act, step the environments, store, learn, and carry the state over.

        Args:
            state: written.
            inputs: of this step.
            updates: of the gradient steps that follow it.
            act_, learn_: replace the methods of these names, for example by compiled functions.
        """
        act_, learn_ = act_ or self.act_, learn_ or self.learn_
        metrics = []
        action = act_(state, inputs.explore, inputs.epsilon)
        if self.env.background:  # learn while they step, from the transitions stored so far
            self.env.send(action)
            metrics = learn_(state, updates)
        env, outcome = self.step_envs(state, action, inputs.env_step, inputs.env_reset)
        self.store_(state, action, outcome)
        if not self.env.background:
            metrics = learn_(state, updates)
        state.env.copy_(env)
        length = torch.where(outcome.done, outcome.episode_length, 0)
        return StepRecord(outcome.episode_return, length, metrics)


# ---------------------------------------------------------------------------- parts of the step


def epsilon_greedy(q_values: Tensor, noise: Tensor, epsilon: Tensor) -> Tensor:
    """A uniformly random action with probability epsilon, else the greedy one.

    Every env copy tosses its own coin. Ties go to the lowest action.

    Args:
        q_values: [M, N, A] float32.
        noise: uniform in [0, 1), [M, N, 2]: the coin and the random action.
        epsilon: [M, 1] float32, in [0, 1].

    Returns:
        int64 [M, N].
    """
    coin, choice = noise.unbind(-1)
    random = (choice * q_values.shape[-1]).long()
    return torch.where(coin < epsilon, random, q_values.argmax(-1))


def held_epsilon_greedy(
    q_values: Tensor, noise: Tensor, epsilon: Tensor, held: Tensor, repeat: Tensor
) -> tuple[Tensor, Tensor]:
    """Epsilon-greedy with lasting random actions: each is repeated with probability `repeat`.

    A copy that holds a random action repeats it with probability `repeat`. Otherwise it draws a new
    one with probability epsilon, and else acts greedily. So a random action lasts 1 / (1 - repeat)
    steps on average, and a fraction epsilon / (1 - repeat + repeat * epsilon) of all steps is
    random. In slow dynamics one random step changes nothing; ten equal ones do.

    Args:
        q_values, noise, epsilon: as `epsilon_greedy`.
        held: random action of each copy in the last step, int64 [M, N]; -1: none.
        repeat: [M, 1] float32, in [0, 1).

    Returns:
        The actions and the random actions now held, int64 [M, N] each.

    Source: Dabney, Ostrovski & Barreto (2021), "Temporally-extended epsilon-greedy exploration",
    with geometric durations.
    """
    coin, choice = noise.unbind(-1)
    random = (choice * q_values.shape[-1]).long()
    # One coin decides first whether the held action is repeated, then whether a new one begins.
    stays = torch.where(held >= 0, repeat, 0.0)
    starts = coin < stays + (1.0 - stays) * epsilon
    held = torch.where(coin < stays, held, torch.where(starts, random, -1))
    return torch.where(held >= 0, held, q_values.argmax(-1)), held


def clip_global_norm_(grads: Sequence[Tensor], max_norm: Tensor) -> Tensor:
    """Scale each member's gradients so that their joint norm is at most `max_norm`.

    Args:
        grads: tensors [M, ...], scaled in place.
        max_norm: [M, 1], > 0; infinity: no clipping.

    Returns:
        Norm before clipping, float32 [M].
    """
    # Tensor by tensor: to join them, compiled code would copy them first, which costs 8 us.
    norms = [torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads]
    norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    # min(1, max_norm / norm). The compiler considers logarithms expensive and computes them once.
    # It would repeat the quotient, and the root in the norm, for every 16 weights: 4 % of a step.
    scale = torch.exp(-torch.relu(torch.log(norm / max_norm[:, 0])))
    torch._foreach_mul_(list(grads), for_each(grads, scale))
    return norm


@torch.no_grad()
def adam_step_(
    adam: Adam,
    params: Params,
    grads: tuple[Tensor, ...],
    step_size: Tensor,
    inverse_correction: Tensor,
) -> None:
    """One step of Adam on `params` and the moments, in place.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    p <- p - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        adam, params, grads: tensors [M, ...] of the same shapes.
        step_size: lr / (1 - b1^t), [M].
        inverse_correction: 1 / sqrt(1 - b2^t), [].

    Source: Kingma & Ba (2015), algorithm 1. Run eagerly, `torch._fused_adam_` would take a fifth of
    the time, but it cannot be traced and cannot take a learning rate from the device.
    """
    beta1, beta2 = ADAM_BETAS
    torch._foreach_lerp_(adam.mean, grads, 1.0 - beta1)
    torch._foreach_mul_(adam.square, beta2)
    torch._foreach_addcmul_(adam.square, grads, grads, 1.0 - beta2)
    denominator = torch._foreach_sqrt(adam.square)
    torch._foreach_mul_(denominator, inverse_correction)
    torch._foreach_add_(denominator, ADAM_EPS)
    steps = torch._foreach_div(adam.mean, denominator)
    torch._foreach_mul_(steps, for_each(params, step_size))
    torch._foreach_sub_(params, steps)


@torch.no_grad()
def sync_target_(target_params: Params, params: Params, weight: Tensor) -> None:
    """target <- (1 - weight) * target + weight * online, weight [M] in [0, 1]; exact at 0 and 1."""
    # One by one: compiled, `_foreach_lerp_` with tensors takes 17 us more of 157.
    weights = for_each(params, weight)
    for target, param, share in zip(target_params, params, weights, strict=True):
        target.lerp_(param, share)


def for_each(params: Sequence[Tensor], values: Tensor) -> list[Tensor]:
    """One value per member, [M], reshaped for each parameter [M, ...] so that it broadcasts."""
    shapes = {ndim: values.view(-1, *[1] * (ndim - 1)) for ndim in {p.ndim for p in params}}
    return [shapes[param.ndim] for param in params]
