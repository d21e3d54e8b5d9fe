"""FedOpt: the sites' combined update as a gradient for an optimiser at the server.

Reddi et al., Adaptive Federated Optimization, ICLR 2021, https://arxiv.org/abs/2003.00295 (Algorithm 2: FedAdagrad,
FedYogi, FedAdam). ``sgd`` is torch.optim.SGD on the pseudo-gradient −d; FedCMT and NVIDIA FLARE's FedOpt run it with
momentum 0.6 and a cosine from learning rate 1.0 to 0.9.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedcmt.algorithms.base import Participant, State, Update
from fedcmt.algorithms.fedavg import FedAvg, weighted_mean
from fedcmt.params import Params, check_shapes, shapes
from fedcmt.settings import is_number, read_settings, require

_WHERE = "server optimizer"
_NAMES = ("sgd", "adam", "yogi", "adagrad")
_SCHEDULES = '{"name": "constant"} or {"name": "cosine", "floor": 0 to 1}'


def _is_schedule(value: object) -> bool:
    if not isinstance(value, Mapping) or value.get("name") not in ("constant", "cosine"):
        return False
    if value["name"] == "constant":
        return set(value) == {"name"}
    return set(value) == {"name", "floor"} and is_number(value["floor"]) and 0 <= value["floor"] <= 1


@dataclass(frozen=True)
class ServerOptimizer:
    """Settings of the server's optimiser; what it remembers travels in the state's memory.

    Attributes:
      name: ``sgd``, or Algorithm 2's ``adam``, ``yogi`` or ``adagrad``.
      lr: Learning rate η of the first round, > 0.
      momentum: ``sgd`` only, in [0, 1): torch's, without dampening or Nesterov.
      betas: All but ``sgd``: (β1, β2), each in [0, 1); ``adagrad`` has no use for β2.
      tau: All but ``sgd``: τ > 0 in m / (√v + τ); v starts at τ².
      schedule: ``{"name": "constant"}``, or ``{"name": "cosine", "floor": f}``: from lr in the first round to f·lr
        after the last, stepped once a round; f in [0, 1].
    """

    name: Literal["sgd", "adam", "yogi", "adagrad"]
    lr: float
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    tau: float = 1e-3
    schedule: Mapping[str, Any] = field(default_factory=lambda: {"name": "constant"})

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
          ValueError: Naming the setting, what came and what was expected.
        """
        require(self.name in _NAMES, _WHERE, "name", self.name, f"one of {', '.join(_NAMES)}")
        require(is_number(self.lr) and self.lr > 0, _WHERE, "lr", self.lr, "a number above 0")
        require(is_number(self.momentum) and 0 <= self.momentum < 1, _WHERE, "momentum", self.momentum, "in [0, 1)")
        require(
            self.name == "sgd" or self.momentum == 0,
            _WHERE,
            "momentum",
            self.momentum,
            f"0 for {self.name}: it has betas",
        )
        betas_ok = isinstance(self.betas, Sequence) and len(self.betas) == 2
        betas_ok = betas_ok and all(is_number(beta) and 0 <= beta < 1 for beta in self.betas)
        require(betas_ok, _WHERE, "betas", self.betas, "two numbers in [0, 1)")
        require(is_number(self.tau) and self.tau > 0, _WHERE, "tau", self.tau, "a number above 0")
        require(_is_schedule(self.schedule), _WHERE, "schedule", self.schedule, _SCHEDULES)

    def learning_rate(self, round_idx: int, num_rounds: int) -> float:
        """The learning rate of a 0-based round; from round ``num_rounds`` on it stays at its last value.

        The cosine is torch's CosineAnnealingLR with ``T_max = num_rounds`` and ``eta_min = floor * lr``.
        """
        if self.schedule["name"] == "constant":
            return self.lr
        floor, done = self.schedule["floor"], min(round_idx, num_rounds) / num_rounds
        return self.lr * (floor + (1 - floor) / 2 * (1 + math.cos(math.pi * done)))

    def step(
        self,
        params: Mapping[str, Tensor],
        direction: Mapping[str, Tensor],
        memory: Mapping[str, Tensor],
        round_idx: int,
        num_rounds: int,
    ) -> tuple[Params, Params]:
        """One step along ``direction``; inputs stay as they are.

        Args:
          params: All the server holds.
          direction: d by name, a weight difference: the pseudo-gradient is −d. Parameters that are not in it, e.g. of a
            group without members in this round, keep their values and their buffers.
          memory: What the last step returned, and any other tensors; empty at first.
          round_idx: 0-based.
          num_rounds: Rounds of the whole job.

        Returns:
          Parameters and memory: ``momentum/<name>`` (sgd with momentum: the buffer, the others: m) and
          ``variance/<name>``, in the parameter's shape and type.

        Raises:
          ParameterError: If the direction has a name or a shape that the parameters have not.
        """
        held = {name: tensor for name, tensor in params.items() if name in direction}
        check_shapes(direction, shapes(held), where="server optimiser")
        lr = self.learning_rate(round_idx, num_rounds)
        new_params, new_memory = dict(params), dict(memory)
        for name, tensor in held.items():
            gradient = -direction[name].to(tensor.dtype)
            if self.name == "sgd":
                new_params[name] = self._sgd(name, tensor, gradient, lr, new_memory)
            else:
                new_params[name] = self._adaptive(name, tensor, gradient, lr, new_memory)
        return new_params, new_memory

    def _sgd(self, name: str, tensor: Tensor, gradient: Tensor, lr: float, memory: Params) -> Tensor:
        if self.momentum:
            key = f"momentum/{name}"
            gradient = self.momentum * memory[key] + gradient if key in memory else gradient
            memory[key] = gradient
        return tensor - lr * gradient

    def _adaptive(self, name: str, tensor: Tensor, gradient: Tensor, lr: float, memory: Params) -> Tensor:
        """Algorithm 2, with its Δ as −gradient, so that m has the sign of torch's Adam."""
        first, second = f"momentum/{name}", f"variance/{name}"
        m = memory[first] if first in memory else torch.zeros_like(tensor)
        v = memory[second] if second in memory else torch.full_like(tensor, self.tau**2)
        memory[first] = self.betas[0] * m + (1 - self.betas[0]) * gradient
        memory[second] = self._variance(v, gradient.square())
        return tensor - lr * memory[first] / (memory[second].sqrt() + self.tau)

    def _variance(self, v: Tensor, squared: Tensor) -> Tensor:
        if self.name == "adagrad":
            return v + squared
        if self.name == "yogi":
            return v - (1 - self.betas[1]) * squared * torch.sign(v - squared)
        return self.betas[1] * v + (1 - self.betas[1]) * squared


FEDCMT_SERVER = ServerOptimizer("sgd", lr=1.0, momentum=0.6, schedule={"name": "cosine", "floor": 0.9})
"""What FedCMT's released job and FLARE's condist-fl run at the server."""


class FedOpt(FedAvg):
    """FedAvg's mean, weighted by cases, as the direction of a server optimiser.

    Args:
      optimizer: Fields of `ServerOptimizer`; `FEDCMT_SERVER` if not given.

    Raises:
      ValueError: If a setting is out of range.
      TypeError: If a setting is unknown, or ``name`` or ``lr`` is missing.
    """

    def __init__(self, optimizer: Mapping[str, Any] | None = None) -> None:
        self.optimizer = FEDCMT_SERVER if optimizer is None else read_optimizer(optimizer)

    def init(self, initial: Params, sites: Sequence[Participant], num_rounds: int) -> State:
        """The state before round 0; the record counts rounds, so that a resumed job goes on along the schedule."""
        return State(dict(initial), record={"round": 0, "num_rounds": num_rounds})

    def aggregate(self, state: State, updates: Mapping[str, Update]) -> State:
        """One step of the optimiser along Σ p_i Δ_i, p_i proportional to the cases of site i."""
        mean = weighted_mean(updates, {site: float(update.num_cases) for site, update in updates.items()})
        round_idx, num_rounds = state.record["round"], state.record["num_rounds"]
        params, memory = self.optimizer.step(state.params, mean, state.memory, round_idx, num_rounds)
        return replace(state, params=params, memory=memory, record={**state.record, "round": round_idx + 1})


def read_optimizer(values: Mapping[str, Any]) -> ServerOptimizer:
    """Settings from a job.

    Raises:
      TypeError: If a key is unknown, or ``name`` or ``lr`` is missing.
      ValueError: If a value is out of range.
    """
    return read_settings(ServerOptimizer, values, _WHERE)
