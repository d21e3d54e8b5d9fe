"""Learning-rate schedules that nnU-Net lacks."""

import math

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch.optim import Optimizer

_DECAY = 0.015
"""Per round, in Fed-MUnet's released code."""


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
