"""A site's network as it was when the round began, to distil from."""

from copy import deepcopy

import torch
from torch import Tensor

from fedcmt.nnunet.trainer import SiteTrainer
from fedcmt.params import copy_into, named_tensors


class Teacher:
    """A second network beside the one that trains; built once, its parameters are copied in place each round.

    Args:
      trainer: Whose network to follow. nnU-Net's normalisation layers keep no running statistics, so evaluation mode
        changes no number.
    """

    def __init__(self, trainer: SiteTrainer) -> None:
        self._trainer = trainer
        self._network = deepcopy(trainer.module).eval().requires_grad_(False)
        self._network.decoder.deep_supervision = False  # type: ignore[union-attr]  # only full resolution is compared

    def follow(self) -> None:
        """Become what the trainer's network is now."""
        copy_into(self._network, named_tensors(self._trainer.module), where="teacher")

    @torch.no_grad()
    def logits(self, data: Tensor) -> Tensor:
        """Logits for input patches [B, C, *spatial] as `SiteTrainer.logits` gives them; one forward pass."""
        with self._trainer.autocast():
            return self._trainer.logits(self._network(data))
