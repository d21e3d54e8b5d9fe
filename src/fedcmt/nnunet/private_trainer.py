"""Training that protects each training case: DP-SGD on nnU-Net's patches, with per-case gradients by Opacus.

Abadi et al., Deep Learning with Differential Privacy, CCS 2016, https://arxiv.org/abs/1607.00133; Opacus: Yousefpour et
al., 2021, https://arxiv.org/abs/2109.12298.

A step draws every case independently with probability q, takes one patch of each drawn case, clips each case's
gradient to 2-norm C, sums, adds noise of standard deviation z C and divides by the expected number of cases. One case
moves the sum by at most C whatever it holds, so n steps are n releases of a Poisson-sampled Gaussian mechanism with
noise multiplier z and sampling rate q.

Importing this module sets up the root logger (Opacus does), so programs that do so themselves import it late.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight, conv3d_weight

from fedcmt.models.fedmepd import FedMEPDNet
from fedcmt.nnunet.trainer import Batch, SiteTrainer
from fedcmt.privacy.noise import NoiseSource
from fedcmt.randomness import RandomStream, derive_seed
from fedcmt.settings import is_int, is_number, require

CaseGradients = dict[nn.Parameter, Tensor]
"""Parameter to its gradient for each case [B, *parameter's shape]; a parameter that has none is left out."""


@dataclass(frozen=True)
class InstancePrivacy:
    """How a site's steps protect its cases.

    Attributes:
      clip: C > 0, largest 2-norm of one case's gradient over all trained parameters.
      noise_multiplier: z >= 0; the noise on the sum of clipped gradients has standard deviation z * clip. 0 clips
        only, and protects nothing.
      expected_batch: Expected number of cases in a step, at least 1.
      noise: Source of the noise, and of which cases a step draws.
      physical_batch: Most cases that are in memory at a time; None for the plans' batch size.
    """

    clip: float
    noise_multiplier: float
    expected_batch: int
    noise: NoiseSource
    physical_batch: int | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
          ValueError: Naming the setting, what came and what was expected.
        """
        z, expected, physical = self.noise_multiplier, self.expected_batch, self.physical_batch
        for key, ok, wanted in (
            ("clip", is_number(self.clip) and self.clip > 0, "a number above 0"),
            ("noise_multiplier", is_number(z) and z >= 0, "a number from 0"),
            ("expected_batch", is_int(expected) and expected >= 1, "a whole number from 1"),
            ("physical_batch", physical is None or (is_int(physical) and physical >= 1), "null or from 1"),
        ):
            require(ok, "instance_dp", key, getattr(self, key), wanted)


def poisson_draw(cases: Sequence[str], rate: float, noise: NoiseSource) -> list[str]:
    """Each case independently with probability ``rate``, in the given order; possibly none.

    A standard normal number is below the normal distribution's quantile of ``rate`` with that probability. The draw
    comes from the noise's source because subsampling protects only while the draw is secret: the site's own random
    stream follows from the job's seed, which the server knows.
    """
    numbers = noise.normal((len(cases),))
    threshold = NormalDist().inv_cdf(rate) if rate < 1 else float("inf")
    return [case for case, number in zip(cases, numbers.tolist(), strict=True) if number < threshold]


class CaseLoader(nnUNetDataLoader):
    """nnU-Net's loader, for one patch of one chosen case at a time."""

    case: str

    @classmethod
    def like(cls, loader: nnUNetDataLoader, label_manager: Any) -> "CaseLoader":
        """With another loader's data, patch sizes and augmentation.

        Foreground is forced with nnU-Net's probability in every patch alike. Its other rule, the last third of a batch,
        would let a case decide about the patches of those behind it.
        """
        spatial = slice(1, None) if loader.patch_size_was_2d else slice(None)
        return cls(
            loader._data,
            1,
            loader.patch_size[spatial],
            loader.final_patch_size[spatial],
            label_manager,
            oversample_foreground_percent=loader.oversample_foreground_percent,
            probabilistic_oversampling=True,
            transforms=loader.transforms,
        )

    def get_indices(self) -> list[str]:
        """The chosen case."""
        return [self.case]

    def patch(self, case: str, seed: int) -> dict[str, Any]:
        """nnU-Net's batch of one patch, which depends on nothing but the case and the seed."""
        self.case = case
        with RandomStream(seed).active():
            return self.generate_train_batch()


def joined(patches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One of nnU-Net's batches from several."""
    targets = [patch["target"] for patch in patches]
    several = isinstance(targets[0], list)
    target = [torch.cat(level) for level in zip(*targets, strict=True)] if several else torch.cat(targets)
    data = torch.cat([patch["data"] for patch in patches])
    return {"data": data, "target": target, "keys": [key for patch in patches for key in patch["keys"]]}


def check_cases_stay_apart(network: nn.Module) -> None:
    """Refuse layers through which one case's numbers reach another's gradient, or that Opacus cannot take apart.

    Raises:
      ValueError: Naming the layers and Opacus' reasons, or the network whose loss is not one of logits alone.
    """
    if isinstance(network, FedMEPDNet):
        raise ValueError(
            "instance_dp: the loss of FedMEPDNet is one of several branches and of features, for which there is no "
            "gradient per case. Choose another network."
        )
    reasons = [
        f"{name} ({type(module).__name__}): {str(error).split('. ')[0]}"
        for name, module in network.named_modules()
        for kind, check in ModuleValidator.VALIDATORS.items()
        if isinstance(module, kind)
        for error in check(module)
    ]
    if reasons:
        raise ValueError(
            f"instance_dp: {len(reasons)} layers of {type(network).__name__} allow no gradient per case: "
            f"{'; '.join(reasons[:2])}. Plan a network with instance or group normalisation and without such layers."
        )


@contextlib.contextmanager
def case_gradients(network: nn.Module) -> Iterator[CaseGradients]:
    """Filled with each case's gradient by the backward pass of what the network computes in here.

    By Opacus' rules for layers, and its functorch one for layers it has no rule for, but not by its hooks on modules:
    in nnU-Net's networks a layer has up to four names (the decoder holds the encoder, a block its layers twice), for
    each of which Opacus would count its gradient once more, and residual blocks add in place to what its hooks return.
    """
    found: CaseGradients = {}
    names = {module: name for name, module in network.named_modules()}

    def watch(module: nn.Module, inputs: tuple, kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
        if len(inputs) != 1 or kwargs or not isinstance(output, Tensor):
            raise ValueError(
                f"instance_dp: {names[module]} ({type(module).__name__}) takes or returns more than one tensor; "
                "such layers have no gradient per case. Choose another network."
            )
        if output.requires_grad:
            entered, version = inputs[0].detach(), inputs[0]._version
            output.register_hook(lambda gradient: collect(module, entered, version, gradient))
        # Changing a view in place, as activations do to instance norm's output, would take the hook out of the graph.
        return output.clone() if output._is_view() else None

    def collect(module: nn.Module, entered: Tensor, version: int, gradient: Tensor) -> None:
        if entered._version != version:
            raise RuntimeError(
                f"instance_dp: the input of {names[module]} ({type(module).__name__}) is overwritten after it was "
                "read. Switch off the in-place operation behind it."
            )
        with torch.no_grad():
            for parameter, values in _rule(module)(module, [entered], gradient.detach()).items():
                if parameter.requires_grad:
                    found[parameter] = found[parameter] + values if parameter in found else values

    handles = [layer.register_forward_hook(watch, with_kwargs=True) for layer in _layers(network)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _layers(network: nn.Module) -> list[nn.Module]:
    """Modules with trained parameters of their own, each once; one without a rule of Opacus' stands for all in it."""
    own = [m for m in network.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    wholes = [module for module in own if type(module) not in GradSampleHooks.GRAD_SAMPLERS]
    inside = {part for whole in wholes for part in whole.modules() if part is not whole}
    return [module for module in own if module not in inside]


def _rule(layer: nn.Module) -> Callable[[Any, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]:
    """What takes a layer, its input and the gradient at its output to its parameters' gradients for each case."""
    if type(layer) in _CONVOLUTIONS:
        # Functorch computes any layer anew; neither other rule knows how such a convolution pads.
        plain = layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
        return convolution_gradients if plain else ft_compute_per_sample_gradient
    return GradSampleHooks.GRAD_SAMPLERS.get(type(layer), ft_compute_per_sample_gradient)


_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def convolution_gradients(layer: Any, activations: list[Tensor], gradient: Tensor) -> dict[nn.Parameter, Tensor]:
    """Gradients per case of a convolution or transposed convolution that pads with zeros, in the form of Opacus' rules.

    Opacus unfolds the input: a 3x3x3 kernel takes 27 times its memory, 7 GB for 32 maps of 128^3 voxels. One ordinary
    weight gradient after the other needs none of that, and is faster on patches of such sizes.

    Args:
      layer: One of `_CONVOLUTIONS`.
      activations: The input [B, C, *spatial], alone in a list.
      gradient: At the output [B, K, *spatial].
    """
    weight_gradient = conv2d_weight if len(layer.kernel_size) == 2 else conv3d_weight
    # A transposed convolution's output plays the part of a convolution's input, and the other way round.
    larger, smaller = (gradient, activations[0]) if layer.transposed else (activations[0], gradient)
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    cases = zip(larger.split(1), smaller.split(1), strict=True)
    found = {layer.weight: torch.stack([weight_gradient(a, layer.weight.shape, b, *geometry) for a, b in cases])}
    return found if layer.bias is None else {**found, layer.bias: gradient.flatten(2).sum(2)}


class PrivateTrainer(SiteTrainer):
    """One site's trainer with DP-SGD steps; make it with `build_trainer` and `private_trainer_of`.

    All trained parameters are clipped jointly and get noise, the personal ones too: these stay at the site, but the
    next gradients of the shared ones depend on them, so that without noise they would carry the cases past it.

    Trains in single precision and uncompiled: the scaling of losses in mixed precision is one for all cases, and
    compiled layers do not report what enters them. ``grad_clip`` is not used.

    Attributes:
      privacy: How the steps protect the cases.
      noise: The source in use: the settings', unless a caller puts another in its place between two rounds.
    """

    privacy: InstancePrivacy
    noise: NoiseSource

    def start(self) -> None:
        """Build network, optimiser, loss and loaders.

        Raises:
          ValueError: If there are loader processes, the network mixes cases, or the expected batch is larger than the
            training set.
        """
        if (workers := get_allowed_n_proc_DA()) > 0:
            raise ValueError(
                f"instance_dp: {workers} loader processes, expected 0: they make patches before a step has drawn its "
                "cases. Set sites.num_workers to 0."
            )
        if (num_cases := self.num_training_cases()) < (expected := self.privacy.expected_batch):
            raise ValueError(
                f"instance_dp: expected_batch is {expected}, expected at most the {num_cases} training cases. Lower it."
            )
        self.grad_scaler = None
        super().start()
        check_cases_stay_apart(self.module)

    def _do_i_compile(self) -> bool:
        return False

    def autocast(self) -> contextlib.AbstractContextManager:
        """Single precision."""
        return contextlib.nullcontext()

    def get_dataloaders(self) -> tuple[Iterator[dict[str, Any]], Any]:
        """Draws of training cases, and nnU-Net's loader of validation patches."""
        training, validation = super().get_dataloaders()
        return self._draws(CaseLoader.like(training.data_loader, self.label_manager)), validation

    @property
    def sampling_rate(self) -> float:
        """q, the probability in (0, 1] with which each training case takes part in a step."""
        return self.privacy.expected_batch / self.num_training_cases()

    def _draws(self, loader: CaseLoader) -> Iterator[dict[str, Any]]:
        """For each step the ids of the drawn cases ("keys") and nnU-Net's batches of their patches ("batches")."""
        cases, rate = sorted(loader.indices), self.sampling_rate
        while True:
            # One number of the site's stream per step, and from it one for each case: which others are drawn changes
            # no case's patch, even for one who knows the stream.
            step_seed = int(torch.randint(2**31, ()))
            drawn = poisson_draw(cases, rate, self.noise)
            yield {"keys": drawn, "batches": self._batches(loader, drawn, step_seed)}

    def _batches(self, loader: CaseLoader, drawn: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
        size = self.privacy.physical_batch or self.batch_size
        for first in range(0, len(drawn), size):
            part = drawn[first : first + size]
            yield joined([loader.patch(case, derive_seed(seed, "patch", case)) for case in part])

    def train_step(self, batch: dict) -> dict:
        """One step on a draw; one without cases is a step with noise alone.

        The loss is the sum of the drawn cases' losses over the expected number of cases, as the gradient is: its
        expectation is the mean loss of the training cases. No noise is on it.

        Raises:
          FloatingPointError: If a case's gradient is not finite; no step is taken.
        """
        self.optimizer.zero_grad(set_to_none=True)
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        sums, loss = {parameter: torch.zeros_like(parameter) for parameter in trained}, 0.0
        for part in batch["batches"]:
            losses, gradients = self.gradients_by_case(part)
            self._add_clipped(sums, gradients, len(losses))
            loss += float(losses.sum())
        for parameter, total in sums.items():
            parameter.grad = self._noisy(total) / self.privacy.expected_batch
        self.optimizer.step()
        return {"loss": loss / self.privacy.expected_batch}

    def _noisy(self, total: Tensor) -> Tensor:
        std = self.privacy.noise_multiplier * self.privacy.clip
        return total + std * self.noise.normal(tuple(total.shape)).to(total) if std > 0 else total

    def _add_clipped(self, sums: Mapping[nn.Parameter, Tensor], gradients: CaseGradients, num_cases: int) -> None:
        """Add to the sums each case's gradient, scaled down to 2-norm ``clip`` over all parameters jointly."""
        squares = torch.zeros(num_cases, dtype=torch.float64, device=self.device)
        for values in gradients.values():
            squares += torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=torch.float64).square()
        if not bool(squares.isfinite().all()):
            raise FloatingPointError(
                f"instance_dp: step {self.steps_done + 1}: a case's gradient is not finite. Lower optimizer.lr or clip."
            )
        factors = (self.privacy.clip / squares.sqrt()).clamp(max=1).float()  # 1 where the norm is 0
        for parameter, values in gradients.items():
            sums[parameter] += torch.einsum("n,n...->...", factors, values)

    def gradients_by_case(self, batch: Mapping[str, Any]) -> tuple[Tensor, CaseGradients]:
        """Loss [B] and gradients of each case of one of nnU-Net's batches, with the algorithm's loss term.

        The batch goes through the network at once, but every case's loss is computed on its own outputs alone: batch
        Dice and means over valid voxels would let cases meet in it.
        """
        data, target = batch["data"].to(self.device), self.read_target(batch)
        with case_gradients(self.module) as gradients:
            output = self.network(data)
        outputs = list(output) if isinstance(output, list | tuple) else [output]
        cases = [self._backward_to_outputs(data, outputs, target, case) for case in range(len(data))]
        losses, at_outputs, directly = zip(*cases, strict=True)
        reached = [index for index, level in enumerate(outputs) if level.requires_grad]
        rows = [torch.cat([levels[index] for levels in at_outputs]) for index in reached]
        torch.autograd.backward([outputs[index] for index in reached], rows)
        self._take_plain_gradients(gradients)
        for case, terms in enumerate(directly):
            for parameter, term in terms.items():
                if parameter not in gradients:
                    gradients[parameter] = term.new_zeros((len(data), *term.shape))
                gradients[parameter][case] += term
        return torch.stack(losses), gradients

    def _backward_to_outputs(
        self, data: Tensor, outputs: Sequence[Tensor], target: Any, case: int
    ) -> tuple[Tensor, list[Tensor], dict[nn.Parameter, Tensor]]:
        """One case's loss, its gradient at each output, and at parameters that the loss has directly, as FedProx's."""
        only = slice(case, case + 1)
        own = [level[only].detach().requires_grad_() for level in outputs]
        output = own if self.enable_deep_supervision else own[0]
        target = [level[only] for level in target] if isinstance(target, list) else target[only]
        loss = self.task_loss(output, target)
        if self.loss_hook is not None:
            loss = self.loss_hook(loss, Batch(data[only], self.logits(output), *self.truth(target)))
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(loss, [*own, *trained], allow_unused=True)
        # Deep supervision gives some outputs no weight; zeros, so that their heads have a gradient of 0.
        levels = [torch.zeros_like(o) if g is None else g for o, g in zip(own, found[: len(own)], strict=True)]
        terms = {p: g for p, g in zip(trained, found[len(own) :], strict=True) if g is not None}
        return loss.detach(), levels, terms

    def _take_plain_gradients(self, gradients: CaseGradients) -> None:
        """Drop the sums that the backward pass left, having checked that the cases' gradients account for them."""
        for name, parameter in self.module.named_parameters():
            total, parameter.grad = parameter.grad, None
            if total is not None and parameter not in gradients and bool(total.any()):
                raise ValueError(
                    f"instance_dp: {name} has a gradient, but none per case: its layer is used other than by a call. "
                    "Choose another network."
                )


def private_trainer_of(privacy: InstancePrivacy) -> Callable[..., PrivateTrainer]:
    """What `build_trainer` takes as ``make`` to train with these settings."""

    # nnUNetTrainer demands its own arguments of every subclass's constructor, so the settings come after it.
    def make(*arguments: Any) -> PrivateTrainer:
        trainer = PrivateTrainer(*arguments)
        trainer.privacy, trainer.noise = privacy, privacy.noise
        return trainer

    return make
