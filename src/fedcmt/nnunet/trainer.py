"""nnU-Net's trainer, driven step by step: built once, loaders alive for the whole job.

Stock `nnUNetTrainer` runs epochs and writes plots and checkpoints at their ends. A federation needs the pieces
between: load tensors in place, take n steps, validate. Network, augmentation, losses, deep supervision and mixed
precision are nnU-Net's own.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler

from fedcmt.config import OptimizerConfig
from fedcmt.data.checks import SPLITS_FILE, DatasetError, check_splits
from fedcmt.models.fedmepd import FedMEPDNet
from fedcmt.models.fedmepd_loss import fedmepd_loss
from fedcmt.models.munet_loss import published_loss
from fedcmt.nnunet.network import uses_deep_supervision
from fedcmt.nnunet.schedules import ExponentialPolyLR, RoundPolyLR
from fedcmt.params import Params
from fedcmt.privacy.noise import NoiseSource
from fedcmt.randomness import RandomStream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """A training step's tensors on the trainer's device.

    Attributes:
      data: Input patches [B, C, *spatial].
      logits: Full-resolution logits [B, K, *spatial], or pooled ones [B, K] of a classifier.
      target: Labels [B, 1, *spatial], regions [B, K, *spatial], or classes [B].
      valid: True where the target counts, the logits' shape without axis 1; None where all of it does.
      output: All that the network returned.
      cases: Ids of the batch's cases.
    """

    data: Tensor
    logits: Tensor
    target: Tensor
    valid: Tensor | None
    output: Any = None
    cases: Sequence[str] = ()


LossName = Literal["dice_ce", "dice", "fedmunet", "fedmepd"]

LossHook = Callable[[Tensor, Batch], Tensor]
"""(the task's loss, batch) -> loss to minimise."""


class MissingStaysMissing:
    """Augmentation after which channels that were zero everywhere in the patch are zero again.

    Noise and brightness would give a missing sequence an image, and a network that looks for zeros would take it.
    """

    def __init__(self, transforms: Callable[..., dict[str, Any]]) -> None:
        self._transforms = transforms

    def __call__(self, **patch: Any) -> dict[str, Any]:
        """Augment nnU-Net's ``image`` [C, *spatial] and what comes with it."""
        present = (patch["image"] != 0).flatten(1).any(dim=1)
        augmented = self._transforms(**patch)
        augmented["image"][~present] = 0
        return augmented


class SiteTrainer(nnUNetTrainer):
    """One site's trainer for the length of a job; make it with `build_trainer`.

    Attributes:
      score: What `validate` measures, in [0, 1].
      noise: Of a trainer that protects its cases; a round's own.
      steps_done: Optimiser steps taken since the job began; the learning-rate schedule's clock.
      round_idx: The job's round, 0-based; the clock of a schedule of rounds.
    """

    score: ClassVar[str] = "dice"
    noise: NoiseSource | None = None
    optimizer_config: OptimizerConfig
    grad_clip: float
    total_steps: int
    steps_per_round: int
    validation_seed: int
    mirror_axes: tuple[int, ...] | None
    missing_channels: bool
    loss_name: LossName
    steps_done: int = 0
    round_idx: int = 0
    loss_hook: LossHook | None = None

    @property
    def module(self) -> nn.Module:
        """The network itself, also when it is compiled: its parameter names are the ones on the wire."""
        network = getattr(self.network, "_orig_mod", self.network)
        assert isinstance(network, nn.Module), "start() has not been called"
        return network

    def start(self) -> None:
        """Build network, optimiser, loss and loaders; stock ``on_train_start`` without its copies and plots."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.initialize()
            self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        if self.loss_name == "fedmepd":
            if not isinstance(self.module, FedMEPDNet):
                raise ValueError(f"loss 'fedmepd' needs planning.network FedMEPDNet, not {type(self.module).__name__}")
            self.module.all_outputs = True

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:
        """Stock augmentation settings with the site's mirror axes."""
        *others, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if self.mirror_axes is not None:
            if not set(self.mirror_axes) <= set(axes):
                raise ValueError(
                    f"mirror_axes is {list(self.mirror_axes)}; patches of this site have axes {list(axes)}"
                )
            axes = self.inference_allowed_mirroring_axes = self.mirror_axes
        return (*others, axes)

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> Callable[..., dict[str, Any]]:
        """Stock augmentation; where channels may be missing, they stay missing."""
        transforms = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        return MissingStaysMissing(transforms) if self.missing_channels else transforms

    def _build_loss(self) -> nn.Module:
        """Stock loss, without its cross-entropy where the site asks for soft Dice alone.

        Raises:
          DatasetError: If the site asks for a loss that its labels do not allow.
        """
        loss = super()._build_loss()
        if self.loss_name in ("fedmunet", "fedmepd") and (self.regions or self.label_manager.has_ignore_label):
            raise DatasetError(
                f"loss {self.loss_name!r} is over labels that exclude each other; this data set has regions or an "
                "ignore label. Use dice_ce."
            )
        if self.loss_name == "dice":
            compound = loss.loss if self.enable_deep_supervision else loss
            compound.weight_ce = 0
        return loss

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's training and validation cases of the fold.

        Raises:
          DatasetError: As `check_splits` of splits_final.json, before nnU-Net reads it.
        """
        file = Path(self.preprocessed_dataset_folder_base) / SPLITS_FILE
        if self.fold != "all" and file.is_file():
            folder = self.preprocessed_dataset_folder
            dataset_class = self.dataset_class or infer_dataset_class(folder)  # nnU-Net's, which `initialize` sets
            check_splits(file, dataset_class.get_identifiers(folder), self.fold)
        return super().do_split()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, LRScheduler]:
        """The site's optimiser and schedule instead of nnU-Net's SGD."""
        config = self.optimizer_config
        kwargs: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
        if config.name == "SGD":
            kwargs |= {"momentum": config.momentum, "nesterov": config.momentum > 0}
        optimizer = getattr(torch.optim, config.name)(self.network.parameters(), **kwargs)
        if config.schedule == "poly":
            return optimizer, PolyLRScheduler(optimizer, config.lr, self.total_steps)
        if config.schedule == "exp_poly":
            return optimizer, ExponentialPolyLR(optimizer, config.lr, self.total_steps, self.steps_per_round)
        if config.schedule == "round_poly":
            return optimizer, RoundPolyLR(optimizer, config.lr, self.total_steps // self.steps_per_round)
        return optimizer, ConstantLR(optimizer, factor=1.0)

    @property
    def sampling_rate(self) -> float | None:
        """Probability with which a case takes part in a step; None where steps take a fixed number of patches."""
        return None

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def train_steps(
        self, num_steps: int, hook: LossHook | None, on_step: Callable[[int, float], None] = lambda step, loss: None
    ) -> float:
        """Take optimiser steps and return the mean loss; ``on_step`` gets the 1-based step and its loss."""
        self.network.train()
        self.loss_hook = hook
        losses = []
        for step in range(1, num_steps + 1):
            if isinstance(self.lr_scheduler, PolyLRScheduler):
                clock = self.round_idx if isinstance(self.lr_scheduler, RoundPolyLR) else self.steps_done
                # Clamped: beyond the last step the base is negative and its power complex.
                self.lr_scheduler.step(min(clock, self.lr_scheduler.max_steps - 1))
            loss = float(self.train_step(next(self.dataloader_train))["loss"])
            self.steps_done += 1
            losses.append(loss)
            on_step(step, loss)
        self.loss_hook = None
        return float(np.mean(losses))

    def forget(self) -> None:
        """Drop the optimiser's momentum and moments."""
        self.optimizer.state.clear()

    @contextlib.contextmanager
    def frozen(self, names: Collection[str], channels: Mapping[str, Sequence[int]] | None = None) -> Iterator[None]:
        """Leave parameters as they are while in here.

        Args:
          names: Those to leave whole; the optimiser passes over what has no gradient.
          channels: Parameter to the indices of its axis 1 to leave. They are put back after every step of the
            optimiser, which moves a parameter as a whole.
        """
        chosen = [
            parameter for name, parameter in self.module.named_parameters() if name in names and parameter.requires_grad
        ]
        for parameter in chosen:
            parameter.requires_grad_(False)
        parameters = dict(self.module.named_parameters())
        kept = [(parameters[n].data, list(c), parameters[n].data[:, list(c)]) for n, c in (channels or {}).items()]

        def put_back(*_: Any) -> None:
            for values, indices, before in kept:
                values[:, indices] = before

        hook = self.optimizer.register_step_post_hook(put_back)
        try:
            yield
        finally:
            hook.remove()
            for parameter in chosen:
                parameter.requires_grad_(True)

    @property
    def regions(self) -> bool:
        """Whether outputs are independent regions and not one choice of label."""
        return bool(self.label_manager.has_regions)

    def train_step(self, batch: dict) -> dict:
        """Stock train_step with the algorithm's loss term and the job's gradient clipping."""
        data, target = batch["data"].to(self.device, non_blocking=True), self.read_target(batch)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            output = self.network(data)
            loss = self.task_loss(output, target)
            if self.loss_hook is not None:
                truth = self.truth(target)
                loss = self.loss_hook(loss, Batch(data, self.logits(output), *truth, output, batch["keys"]))
        self._backward(loss)
        return {"loss": loss.detach().cpu().numpy()}

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision where the device has it."""
        return torch.autocast("cuda") if self.device.type == "cuda" else contextlib.nullcontext()

    def read_target(self, batch: Mapping[str, Any]) -> Any:
        """The target of a loader's batch as `task_loss` takes it, on the device."""
        target = batch["target"]
        if isinstance(target, list):
            return [t.to(self.device, non_blocking=True) for t in target]
        return target.to(self.device, non_blocking=True)

    def task_loss(self, output: Any, target: Any) -> Tensor:
        """The site's own loss, nnU-Net's."""
        if self.loss_name == "fedmepd":
            return fedmepd_loss(output, target)
        if self.loss_name == "fedmunet":
            several = isinstance(output, list | tuple)
            return published_loss(output, target) if several else published_loss([output], [target])
        return 1 + self.loss(output, target) if self.loss_name == "dice" else self.loss(output, target)

    def logits(self, output: Any) -> Tensor:
        """The one prediction in a network's output: under deep supervision the full-resolution one."""
        return output[0] if isinstance(output, list | tuple) else output

    def truth(self, target: Any) -> tuple[Tensor, Tensor | None]:
        """Full-resolution target, and where it counts: not at voxels of the ignore label."""
        full = target[0] if isinstance(target, list) else target
        if not self.label_manager.has_ignore_label:
            return full, None
        if self.regions:  # nnU-Net appends the ignore mask as a last channel
            return full[:, :-1], full[:, -1] == 0
        return full, full[:, 0] != self.label_manager.ignore_label

    def _backward(self, loss: Tensor) -> None:
        if self.grad_scaler is None:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.grad_clip)
            self.optimizer.step()
            return
        self.grad_scaler.scale(loss).backward()
        self.grad_scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.grad_clip)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    @torch.no_grad()
    def validate(self, num_batches: int) -> float:
        """Mean pseudo-Dice in [0, 1] over labels or regions on patches of the validation cases.

        Without loader processes the patches are the same at each call, so that rounds compare; training's random
        numbers are left alone. A label absent from reference and prediction counts as 1, as in
        `fedcmt.evaluation.metrics`.
        """
        self.network.eval()
        with RandomStream(self.validation_seed).active():
            outputs = [self.validation_step(next(self.dataloader_val)) for _ in range(num_batches)]
        tp, fp, fn = (np.sum([o[key] for o in outputs], axis=0) for key in ("tp_hard", "fp_hard", "fn_hard"))
        denominator = 2 * tp + fp + fn
        return float(np.mean(np.where(denominator > 0, 2 * tp / np.maximum(denominator, 1), 1.0)))

    def validation_cases(self) -> tuple[list[str], list[str]]:
        """Case ids of the training and of the validation split."""
        train, validation = self.do_split()
        return list(train), list(validation)

    def num_training_cases(self) -> int:
        """Training cases that have a loss: |D_i| in the weights of an aggregation."""
        return len(self.validation_cases()[0])

    def export_state(self) -> tuple[Params, dict[str, Any]]:
        """Optimiser state as named tensors and plain values, for `load_state`."""
        state = self.optimizer.state_dict()
        tensors: Params = {}
        for index, values in state["state"].items():
            tensors |= {f"{index}/{key}": value for key, value in values.items() if isinstance(value, Tensor)}
        scaler = None if self.grad_scaler is None else self.grad_scaler.state_dict()
        return tensors, {"steps_done": self.steps_done, "groups": state["param_groups"], "scaler": scaler}

    def load_state(self, tensors: Params, plain: Mapping[str, Any]) -> None:
        """Continue where `export_state` was called."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, key = name.split("/")
            state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": plain["groups"]})
        if self.grad_scaler is not None and plain["scaler"] is not None:
            self.grad_scaler.load_state_dict(plain["scaler"])
        self.steps_done = int(plain["steps_done"])

    def close(self) -> None:
        """Stop the loader processes, if any; they would outlive this one."""
        for loader in (self.dataloader_train, self.dataloader_val):
            if isinstance(loader, NonDetMultiThreadedAugmenter):
                loader._finish()

    def print_to_log_file(self, *args: object, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """nnU-Net's messages go to the log, not to a file of their own."""
        logger.debug(" ".join(str(a) for a in args).strip())


def build_trainer(
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    *,
    configuration: str,
    fold: int | str,
    device: torch.device,
    optimizer: OptimizerConfig,
    grad_clip: float,
    total_steps: int,
    steps_per_round: int | None = None,
    seed: int,
    mirror_axes: Sequence[int] | None = None,
    missing_channels: bool = False,
    loss: LossName = "dice_ce",
    make: Callable[..., SiteTrainer] = SiteTrainer,
) -> SiteTrainer:
    """A started trainer with a network initialised from ``seed``.

    Args:
      plans: The site's installed plans.
      dataset_json: The site's dataset.json.
      configuration: E.g. "3d_fullres".
      fold: 0 to 4, or "all".
      device: Where to train; CUDA trains with mixed precision.
      optimizer: Optimiser and schedule.
      grad_clip: Largest 2-norm of the gradient.
      total_steps: Local steps of the whole job, for the schedule.
      steps_per_round: For a schedule that decays from round to round; None is all of them.
      seed: Of the network's initial values and of the validation patches.
      mirror_axes: Axes of a patch along which it may be mirrored; None is all.
      missing_channels: Whether a channel of zeros is a missing sequence, which augmentation must leave alone.
      loss: "dice_ce" is nnU-Net's cross-entropy - soft Dice, "dice" 1 - soft Dice in [0, 1], "fedmunet"
        `fedcmt.models.munet_loss.published_loss` and "fedmepd" `fedcmt.models.fedmepd_loss.fedmepd_loss`.
      make: Gives the trainer, not yet started, from nnU-Net's arguments.
    """
    # The constructor pops this key from the dict it is given (nnU-Net 2.8.1).
    own_plans = {**deepcopy(dict(plans)), "continue_training": False}
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = make(own_plans, configuration, fold, deepcopy(dict(dataset_json)), device)
    trainer.enable_deep_supervision = uses_deep_supervision(plans, configuration)
    trainer.optimizer_config = optimizer
    trainer.grad_clip = grad_clip
    trainer.total_steps = total_steps
    trainer.steps_per_round = total_steps if steps_per_round is None else steps_per_round
    trainer.validation_seed = seed
    trainer.loss_name = loss
    trainer.missing_channels = missing_channels
    trainer.mirror_axes = None if mirror_axes is None else tuple(mirror_axes)
    torch.manual_seed(seed)
    trainer.start()
    return trainer
