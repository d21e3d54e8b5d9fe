"""Learning-rate schedules that nnU-Net lacks."""

import math

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch.optim import Optimizer

_DECAY = 0.015
"""Per round, in Fed-MUnet's released code."""
_DIGITS = 8
"""After the point, of a rate in FedMEPD's released code."""


class ExponentialPolyLR(PolyLRScheduler):
    """nnU-Net's decay and a further one from round to round: lr exp(-0.015 round) (1 - step / total)^0.9.

    As the released code of Fed-MUnet (arXiv 2409.01020) trains; there the polynomial's length is a setting that is
    missing, and here it is the job's steps.

    Args:
      optimizer: Its learning rate is set.
      lr: Of the first step.
      total_steps: Of the whole job.
      steps_per_round: A site's steps in a round.
    """

    def __init__(self, optimizer: Optimizer, lr: float, total_steps: int, steps_per_round: int) -> None:
        self._steps_per_round = steps_per_round
        super().__init__(optimizer, lr, total_steps)

    def step(self, current_step: int | None = None) -> None:
        """Set the rate of a step, 0-based; the next one where none is given."""
        super().step(current_step)
        last = self.ctr - 1 if current_step is None or current_step == -1 else current_step
        decay = math.exp(-_DECAY * (last // self._steps_per_round))
        for group in self.optimizer.param_groups:
            group["lr"] *= decay


class RoundPolyLR(PolyLRScheduler):
    """One rate for all steps of a round: lr (1 - round / rounds)^0.9, rounded to 8 digits after the point.

    As the released code of FedMEPD (arXiv 2603.04887) trains. The clock is the job's round, also at a site that has
    not taken part in all of them.

    Args:
      optimizer: Its learning rate is set.
      lr: Of round 0.
      rounds: R, of the whole job.

    Raises:
      ValueError: If the last round's rate would be rounded to 0.
    """

    def __init__(self, optimizer: Optimizer, lr: float, rounds: int) -> None:
        last = lr * (1 / rounds) ** 0.9
        if round(last, _DIGITS) == 0:
            raise ValueError(
                f"optimizer: with lr {lr:g} and schedule round_poly the last of {rounds} rounds has the rate "
                f"{last:.1e}, which is rounded to 0. Use a larger lr, or schedule poly."
            )
        super().__init__(optimizer, lr, rounds)

    def step(self, current_step: int | None = None) -> None:
        """Set the rate of a round, 0-based; the next one where none is given."""
        super().step(current_step)
        for group in self.optimizer.param_groups:
            group["lr"] = round(group["lr"], _DIGITS)
