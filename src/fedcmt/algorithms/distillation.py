"""Global-to-local distillation: keep a site's predictions near those of the model it received.

The released FedCMT takes the cross-entropy of the student against the teacher's softmax, averaged over classes, as in
incremental segmentation (Michieli and Zanuttigh, ICCV Workshops 2019). The KL divergence summed over classes has the
same gradient up to the number of classes, and is 0 where student and teacher agree, so its value can be read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcmt.settings import is_number, read_settings, require

_WHERE = "distillation"
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
        for key, ok, expected in (
            ("maximum", is_number(self.maximum) and self.maximum >= 0, "a number from 0"),
            ("temperature", is_number(self.temperature) and self.temperature > 0, "a number above 0"),
            ("start", is_number(self.start) and 0 <= self.start <= 1, "a number in [0, 1]"),
            ("gate", isinstance(self.gate, bool), "true or false"),
        ):
            require(ok, _WHERE, key, getattr(self, key), expected)

    def coefficient(self, round_idx: int, num_rounds: int) -> float:
        """The weight of the term in a 0-based round.

        0 in round 0, where there is nothing to keep near to. In round r of R rounds
        ``maximum * (start + (1 - start) * min(1, (r - 1) / (R - 2)))``: a straight line from ``start`` in round 1 to 1
        in the last round, and 1 beyond it; with R = 2 round 1 is the last and has ``maximum``. Exactly 0 where it would
        be below 1e-3, so that the teacher can be left out.
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
          Scalar float32, ≥ 0 up to rounding. Value and gradient are exactly 0 if student and teacher are equal, or if
          nothing counts.

        Raises:
          ValueError: If the teacher's shape is not the student's, or ``valid`` does not fit them.
        """
        _check(teacher.shape == student.shape, "teacher's logits", teacher, f"the student's {tuple(student.shape)}")
        _check_valid(valid, student)
        student, teacher = student.float() / self.temperature, teacher.detach().float() / self.temperature
        if regions:
            # A region is a choice between two classes with logits (z, 0).
            student, teacher = (torch.stack((z, torch.zeros_like(z)), dim=1) for z in (student, teacher))
            per_voxel = _categorical_kl(student, teacher).sum(1)
        else:
            per_voxel = _categorical_kl(student, teacher)
        per_voxel = self.temperature**2 * per_voxel
        if valid is None:
            return per_voxel.mean()
        return torch.where(valid, per_voxel, 0.0).sum() / valid.sum().clamp(min=1)

    def trust(self, teacher: Tensor, target: Tensor, *, regions: bool, valid: Tensor | None = None) -> Tensor:
        """How right the teacher is on a batch, in [0, 1]: accuracy of classes, mean hard Dice of labels or regions.

        Args:
          teacher: Logits [B, K, *spatial] or [B, K].
          target: Labels [B, 1, *spatial] (0 is background), regions [B, K, *spatial] in {0, 1}, or classes [B] with -1
            for unknown.
          regions: Whether the K outputs are independent regions.
          valid: As for `divergence`.

        Returns:
          Scalar float32 without gradient. Dice is taken over the batch and is the mean over the foreground labels or
          regions that target or teacher hold; 1 if there are none, and if no class is known.

        Raises:
          ValueError: If the target's shape or ``valid`` does not fit the logits.
        """
        batch, outputs, *spatial = teacher.shape
        expected = (batch, outputs if regions else 1, *spatial) if spatial else (batch,)
        _check(target.shape == expected, "target", target, str(expected))
        _check_valid(valid, teacher)
        if spatial:
            scores = _hard_dice(teacher, target, regions, valid)
        else:
            known = target >= 0 if valid is None else (target >= 0) & valid
            scores = (teacher.argmax(1) == target)[known].float()
        return scores.mean() if scores.numel() else torch.ones((), device=teacher.device)


def read_distillation(values: Mapping[str, Any]) -> Distillation:
    """Settings from a job.

    Raises:
      TypeError: If a key is unknown.
      ValueError: If a value is out of range.
    """
    return read_settings(Distillation, values, _WHERE)


def _categorical_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax teacher ‖ softmax student) over axis 1: Σ p_T (z_T − z_S) + ln Σ exp z_S − ln Σ exp z_T.

    In this form the gradient's two halves, softmax z_S and p_T, come from the same operations and cancel to the bit
    where student and teacher agree; log_softmax leaves rounding, since its probabilities do not sum to exactly 1.
    """
    # With the largest logit at 0 both logarithms stay within [0, ln K], and large logits cancel nothing.
    student = student - student.detach().amax(1, keepdim=True)
    teacher = teacher - teacher.amax(1, keepdim=True)
    log_sum = teacher.logsumexp(1, keepdim=True)
    cross = ((teacher - log_sum).exp() * (teacher - student)).sum(1)
    return cross + student.logsumexp(1) - log_sum.squeeze(1)


def _hard_dice(teacher: Tensor, target: Tensor, regions: bool, valid: Tensor | None) -> Tensor:
    """Dice over the batch of each foreground label or region that occurs; arguments as for `Distillation.trust`."""
    if regions:
        ours, truth = teacher > 0, target > 0
    else:
        labels = torch.arange(1, teacher.shape[1], device=teacher.device).view(1, -1, *[1] * (teacher.ndim - 2))
        ours, truth = teacher.argmax(1, keepdim=True) == labels, target == labels
    if valid is not None:
        ours, truth = ours & valid.unsqueeze(1), truth & valid.unsqueeze(1)
    axes = [0, *range(2, teacher.ndim)]
    both, sizes = (ours & truth).sum(axes), ours.sum(axes) + truth.sum(axes)
    return (2 * both / sizes)[sizes > 0]


def _check_valid(valid: Tensor | None, logits: Tensor) -> None:
    if valid is not None:
        expected = (logits.shape[0], *logits.shape[2:])
        _check(valid.shape == expected and valid.dtype == torch.bool, "valid", valid, f"bool {expected}")


def _check(ok: bool, what: str, tensor: Tensor, expected: str) -> None:
    if not ok:
        raise ValueError(f"distillation: {what}: {tensor.dtype} {tuple(tensor.shape)}, expected {expected}")
