"""Global-to-local distillation: keep a site's predictions near those of the model it received.

The released FedCMT takes the cross-entropy of the student against the teacher's softmax, averaged over classes, as in
incremental segmentation (Michieli and Zanuttigh, ICCV Workshops 2019). The KL divergence summed over classes has the same
gradient up to the number of classes, and is 0 where student and teacher agree, so its value can be read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Distillation:
    """How much, and how, a site distils.

    Attributes:
      maximum: Largest coefficient, ≥ 0; 0 switches distillation off.
      temperature: τ > 0 that both logits are divided by; the divergence is multiplied by τ².
      start: The ramp's first value as a fraction of ``maximum``, in [0, 1].
      gate: Weigh the term by how right the teacher is on the batch.
    """

    maximum: float = 1.0
    temperature: float = 1.0
    start: float = 0.01
    gate: bool = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
          ValueError: Naming the setting, what came and what was expected.
        """
        for name, ok, expected in (
            ("maximum", _is_number(self.maximum) and self.maximum >= 0, "a number from 0"),
            ("temperature", _is_number(self.temperature) and self.temperature > 0, "a number above 0"),
            ("start", _is_number(self.start) and 0 <= self.start <= 1, "a number in [0, 1]"),
            ("gate", isinstance(self.gate, bool), "true or false"),
        ):
            if not ok:
                raise ValueError(f"distillation: {name} is {getattr(self, name)!r}, expected {expected}")

    def coefficient(self, round_idx: int, num_rounds: int) -> float:
        """The weight of the term in a 0-based round.

        0 in round 0, where there is nothing to keep near to; then ``maximum`` times a straight line from ``start`` in
        round 1 to 1 in the last round, and 1 beyond it. A job of two rounds has only the end of the line. Exactly 0 where
        it would be below 1e-3, so that the teacher can be left out.
        """
        if round_idx < 1:
            return 0.0
        done = min(1.0, (round_idx - 1) / (num_rounds - 2)) if num_rounds > 2 else 1.0
        value = self.maximum * (self.start + (1 - self.start) * done)
        return value if value >= _NEGLIGIBLE else 0.0

    def divergence(self, student: Tensor, teacher: Tensor, *, regions: bool, valid: Tensor | None = None) -> Tensor:
        """τ² KL(teacher ‖ student), summed over classes or regions, mean over voxels or samples.

        Args:
          student: Logits [B, K, *spatial] or [B, K].
          teacher: Logits of the same shape; no gradient reaches them.
          regions: Whether the K outputs are independent (Bernoulli KL each) and not one choice (categorical KL).
          valid: True where a voxel or sample counts, the logits' shape without axis 1; None for everywhere.

        Returns:
          Scalar float32 ≥ 0; 0 with a gradient of 0 if nothing counts.
        """
        student = student.float() / self.temperature
        teacher = teacher.detach().float() / self.temperature
        if regions:
            shift = functional.softplus(student) - functional.softplus(teacher)
            divergence = torch.sigmoid(teacher) * (teacher - student) + shift
        else:
            log_teacher, log_student = teacher.log_softmax(1), student.log_softmax(1)
            divergence = log_teacher.exp() * (log_teacher - log_student)
        per_voxel = self.temperature**2 * divergence.sum(1)
        if valid is None:
            return per_voxel.mean()
        return torch.where(valid, per_voxel, 0.0).sum() / valid.sum().clamp(min=1)

    @torch.no_grad()
    def trust(self, teacher: Tensor, target: Tensor, *, regions: bool, valid: Tensor | None = None) -> Tensor:
        """How right the teacher is on a batch, in [0, 1]: accuracy of classes, mean hard Dice of labels or regions.

        Args:
          teacher: Logits [B, K, *spatial] or [B, K].
          target: Labels [B, 1, *spatial] (0 is background), regions [B, K, *spatial] in {0, 1}, or classes [B] with -1
            for unknown.
          regions: Whether the K outputs are independent regions.
          valid: As for `divergence`.

        Returns:
          Scalar without gradient. Dice is the mean over foreground labels or regions that target or teacher hold; 1 if
          there are none, and if no class is known.
        """
        if teacher.ndim == 2:
            known = target >= 0
            right = (teacher.argmax(1) == target)[known].float()
            return right.mean() if right.numel() else teacher.new_ones(())
        if regions:
            ours, truth = teacher > 0, target > 0
        else:
            classes = torch.arange(1, teacher.shape[1], device=teacher.device).view(1, -1, *[1] * (teacher.ndim - 2))
            ours, truth = teacher.argmax(1, keepdim=True) == classes, target == classes
        if valid is not None:
            ours, truth = ours & valid.unsqueeze(1), truth & valid.unsqueeze(1)
        axes = [0, *range(2, teacher.ndim)]
        both, either = (ours & truth).sum(axes).float(), (ours.sum(axes) + truth.sum(axes)).float()
        dice = (2 * both / either)[either > 0]
        return dice.mean() if dice.numel() else teacher.new_ones(())


def read_distillation(values: Mapping[str, Any]) -> Distillation:
    """Settings from a job.

    Raises:
      TypeError: If a key is unknown.
      ValueError: If a value is out of range.
    """
    known = {f.name for f in fields(Distillation)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise TypeError(f"distillation: unknown keys {unknown}; known keys: {sorted(known)}")
    return Distillation(**values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
