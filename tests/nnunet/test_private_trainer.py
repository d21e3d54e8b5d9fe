"""DP-SGD steps on nnU-Net's patches: gradients per case, clipping, noise, draws and state, on a tiny data set."""

import copy
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from opacus.accountants import RDPAccountant
from torch import Tensor, nn

from fedcmt.config import OptimizerConfig
from fedcmt.models.fedmepd import FedMEPDNet
from fedcmt.models.munet import MUNet
from fedcmt.models.trans_unet3d import TransUNet3D
from fedcmt.models.unet3d import UNet3D
from fedcmt.nnunet.paths import nnunet_paths
from fedcmt.nnunet.private_trainer import (
    CaseLoader,
    InstancePrivacy,
    PrivateTrainer,
    case_gradients,
    check_cases_stay_apart,
    joined,
    poisson_draw,
    private_trainer_of,
)
from fedcmt.nnunet.teacher import Teacher
from fedcmt.nnunet.trainer import Batch, LossHook, build_trainer
from fedcmt.params import snapshot
from fedcmt.privacy.accounting import Release, epsilon
from fedcmt.privacy.noise import SeededNoise
from fedcmt.randomness import RandomStream
from tests.nnunet.tiny_site import make_site

SGD = OptimizerConfig("SGD", lr=1.0, weight_decay=0.0)
LOWEST_HEAD = "decoder.seg_layers.0."
"""Deep supervision gives the output of the lowest resolution no weight."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict]:
    """nnU-Net's folders, installed plans and dataset.json of a small data set; batch Dice is on."""
    root, own, dataset_json = make_site(tmp_path_factory.mktemp("site"))
    own["configurations"]["3d_fullres"]["batch_dice"] = True
    return root, own, dataset_json


def private(**changes: Any) -> InstancePrivacy:
    settings: dict[str, Any] = {"clip": 1.0, "noise_multiplier": 0.0, "expected_batch": 2, "noise": SeededNoise(1)}
    return InstancePrivacy(**(settings | changes))


@pytest.fixture
def trainer_of(site: tuple[Path, dict, dict], monkeypatch: pytest.MonkeyPatch) -> Callable[..., PrivateTrainer]:
    """Makes a started trainer from `private`'s settings."""
    root, plans, dataset_json = site
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")

    def make(optimizer: OptimizerConfig = SGD, plans: dict = plans, seed: int = 1, **changes: Any) -> PrivateTrainer:
        with nnunet_paths(preprocessed=root / "preprocessed", results=root / "results"):
            trainer = build_trainer(
                plans,
                dataset_json,
                configuration="3d_fullres",
                fold=0,
                device=torch.device("cpu"),
                optimizer=optimizer,
                grad_clip=1e-9,
                total_steps=4,
                seed=seed,
                make=private_trainer_of(private(**changes)),
            )
        assert isinstance(trainer, PrivateTrainer)
        trainer.network.train()
        return trainer

    return make


def full_draw(trainer: PrivateTrainer) -> list[dict]:
    """A batch of one patch for each training case, always the same ones."""
    with RandomStream(7).active():
        trainer.noise = SeededNoise(0)
        draw = next(draw for draw in islice(trainer.dataloader_train, 200) if len(draw["keys"]) == 4)
        return [split for batch in draw["batches"] for split in one_by_one(batch)]


def one_by_one(batch: dict) -> list[dict]:
    """A batch's patches as batches of one."""
    return [
        {
            "data": batch["data"][i : i + 1],
            "target": [level[i : i + 1] for level in batch["target"]],
            "keys": [key],
        }
        for i, key in enumerate(batch["keys"])
    ]


def moved(trainer: PrivateTrainer, batches: list[dict]) -> Tensor:
    """What one step on these batches adds to all parameters; then it is taken back."""
    before = copy.deepcopy(trainer.module.state_dict())
    old = torch.cat([p.detach().flatten() for p in trainer.module.parameters()])
    trainer.train_step({"keys": [], "batches": iter(batches)})
    new = torch.cat([p.detach().flatten() for p in trainer.module.parameters()])
    trainer.module.load_state_dict(before)
    return new - old


def proximal(trainer: PrivateTrainer) -> LossHook:
    """FedProx's term and one on the logits, weighted by the case."""
    received = {n: t + 0.1 for n, t in snapshot(trainer.module).items()}

    def hook(loss: Tensor, batch: Batch) -> Tensor:
        assert len(batch.data) == len(batch.logits) == len(batch.target) == 1
        pull = sum((p - received[n]).square().sum() for n, p in trainer.module.named_parameters())
        return loss + batch.data.mean().square() * pull + batch.logits.square().mean()

    return hook


def plain_gradient(trainer: PrivateTrainer, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradient of a batch of one case by an ordinary backward pass."""
    target, output = trainer.read_target(batch), trainer.network(batch["data"])
    loss = trainer.task_loss(output, target)
    if trainer.loss_hook is not None:
        loss = trainer.loss_hook(loss, Batch(batch["data"], trainer.logits(output), *trainer.truth(target)))
    trainer.network.zero_grad()
    loss.backward()
    return loss.detach(), {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in trainer.module.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("with_hook", [False, True])
@pytest.mark.parametrize("frozen", [(), ("encoder.stages.1.", "decoder.seg_layers.1.bias")])
def test_gradients_per_case_are_those_of_a_backward_pass_per_case(
    trainer_of: Callable[..., PrivateTrainer], with_hook: bool, frozen: tuple[str, ...]
) -> None:
    trainer = trainer_of()
    cases = full_draw(trainer)[:3]
    trainer.loss_hook = proximal(trainer) if with_hook else None
    names = {n for n, _ in trainer.module.named_parameters() if n.startswith(frozen)} if frozen else set()
    with trainer.frozen(names):
        expected = [plain_gradient(trainer, case) for case in cases]
        losses, gradients = trainer.gradients_by_case(joined(cases))
    torch.testing.assert_close(losses, torch.stack([loss for loss, _ in expected]))
    by_name = {n: gradients[p] for n, p in trainer.module.named_parameters() if p in gradients}
    assert set(by_name) == set(expected[0][1])
    for name, found in by_name.items():
        wanted = torch.stack([gradient[name] for _, gradient in expected])
        assert float((found - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max())), name
        if name.startswith(LOWEST_HEAD) and not with_hook:
            assert not found.any()


class Scaled(nn.Module):
    """A layer that Opacus has no rule for, with a parameter of its own and a layer within."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0]).view(1, 2, 1, 1, 1))
        self.inner = nn.Conv3d(2, 2, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale) + x


def small_network(kind: str, unet: Callable[..., nn.Module]) -> nn.Module:
    if kind == "UNet3D":
        return UNet3D(2, 3, n_stages=2, features_per_stage=(4, 6))
    if kind == "MUNet":
        return MUNet(2, 3, 2, stem_features=2, features_per_stage=(4, 8), deep_supervision=False, dimensions=3)
    if kind == "own parameters":
        layer = nn.Conv3d(2, 2, 1)
        return nn.Sequential(layer, Scaled(), nn.LeakyReLU(inplace=True), layer)  # one layer twice
    return unet(kind)


@pytest.mark.parametrize("kind", ["plain", "residual", "UNet3D", "MUNet", "own parameters"])
def test_every_kind_of_network_gives_gradients_per_case(unet: Callable[..., nn.Module], kind: str) -> None:
    torch.manual_seed(2)
    network = small_network(kind, unet)
    data = torch.randn(3, 2, 8, 8, 12)
    data[1, 1] = 0  # a modality that one case lacks
    parameters = [*network.parameters()]
    expected = [torch.autograd.grad(network(one[None]).square().mean(), parameters, allow_unused=True) for one in data]
    with case_gradients(network) as gradients:
        output = network(data)
    sum(one.square().mean() for one in output).backward()
    for (name, parameter), found in zip(network.named_parameters(), zip(*expected, strict=True), strict=True):
        if found[0] is None:  # without deep supervision, nnU-Net's lower heads are not called
            assert parameter not in gradients, name
        else:
            torch.testing.assert_close(gradients[parameter], torch.stack(found), rtol=1e-4, atol=1e-5, msg=name)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0), bias=False),
        nn.Conv3d(4, 6, 3, stride=(1, 2, 3), padding=(1, 0, 2), dilation=(1, 2, 1), groups=2),
        nn.Conv3d(4, 6, (1, 3, 3), padding="same"),
        nn.Conv3d(4, 6, 3, padding=1, padding_mode="replicate"),
        nn.ConvTranspose2d(4, 6, 2, stride=2),
        nn.ConvTranspose3d(4, 6, (2, 3, 3), stride=(2, 3, 2), padding=(0, 1, 1), output_padding=(1, 2, 0), groups=2),
    ],
    ids=str,
)
def test_convolutions_of_any_geometry_give_gradients_per_case(layer: nn.Module) -> None:
    data = torch.randn(3, 4, *(5, 9, 7)[: 2 if "2d" in str(layer) else 3])
    parameters = [*layer.parameters()]
    expected = [torch.autograd.grad(layer(one[None]).square().sum(), parameters) for one in data]
    with case_gradients(layer) as gradients:
        output = layer(data)
    output.square().sum().backward()
    for parameter, wanted in zip(parameters, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(gradients[parameter], torch.stack(wanted), rtol=1e-4, atol=1e-4)


class Pair(nn.Module):
    """Needs two inputs, which have no one gradient per case here."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.weight * left * right


class Applied(nn.Module):
    """Calls a layer with two inputs, or overwrites what a layer has read."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.pair, self.norm = how, Pair(), nn.InstanceNorm3d(2, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "two inputs":
            return self.pair(x, x)
        result = self.norm(x)
        x.mul_(2)
        return result


@pytest.mark.parametrize(
    ("how", "message"),
    [("two inputs", r"pair \(Pair\) takes or returns more than one"), ("overwritten", r"input of norm .*overwritten")],
)
def test_a_layer_without_gradients_per_case_is_refused(how: str, message: str) -> None:
    network, data = Applied(how), torch.randn(2, 2, 4, 4, 6)
    with pytest.raises((ValueError, RuntimeError), match=message), case_gradients(network):
        network(data).sum().backward()


class Uncalled(nn.Module):
    """Uses a layer's weights without calling it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv3d(x, self.layer.weight, self.layer.bias)  # type: ignore[arg-type]


def test_a_layer_used_without_a_call_is_refused(trainer_of: Callable[..., PrivateTrainer]) -> None:
    trainer = trainer_of()
    heads = trainer.module.get_submodule("decoder.seg_layers")
    assert isinstance(heads, nn.ModuleList)
    heads[-1] = Uncalled(heads[-1])
    with pytest.raises(ValueError, match=r"decoder\.seg_layers\.1\.layer\.weight has a gradient, but none per case"):
        trainer.gradients_by_case(full_draw(trainer)[0])


def test_one_case_moves_a_step_by_at_most_clip_over_expected_batch(
    trainer_of: Callable[..., PrivateTrainer],
) -> None:
    trainer = trainer_of(clip=0.01, expected_batch=4)
    *others, outlier = full_draw(trainer)
    trainer.loss_hook = lambda loss, batch: loss * (1e6 if torch.equal(batch.data, outlier["data"]) else 1)
    without, with_it = moved(trainer, others), moved(trainer, [*others, outlier])
    assert float((with_it - without).norm()) == pytest.approx(0.01 / 4, rel=1e-3)
    assert float(without.norm()) <= 3 * 0.01 / 4 * (1 + 1e-3)


def test_a_gradient_within_the_bound_is_left_as_it_is(trainer_of: Callable[..., PrivateTrainer]) -> None:
    trainer = trainer_of(clip=1e6, expected_batch=4)
    case = full_draw(trainer)[0]
    gradient = torch.cat([g.flatten() for g in plain_gradient(trainer, case)[1].values()])
    torch.testing.assert_close(moved(trainer, [case]), -gradient / 4, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("empty", [True, False])
def test_every_trained_parameter_gets_noise_of_the_right_width(
    trainer_of: Callable[..., PrivateTrainer], empty: bool
) -> None:
    quiet, noisy = trainer_of(clip=0.5), trainer_of(clip=0.5, noise_multiplier=3.0)
    batches = [] if empty else full_draw(quiet)[:2]
    noise = moved(noisy, batches) - moved(quiet, batches)
    # z clip / expected_batch, on n values known to 1 / sqrt(2 n).
    assert len(noise) > 5000
    assert float(noise.std()) == pytest.approx(3.0 * 0.5 / 2, rel=5 / (2 * len(noise)) ** 0.5)
    assert abs(float(noise.mean())) < 5 * 0.75 / len(noise) ** 0.5
    sizes = [p.numel() for p in noisy.module.parameters()]
    assert all(bool(part.any()) for part in noise.split(sizes))


def test_frozen_parameters_get_neither_gradient_nor_noise(trainer_of: Callable[..., PrivateTrainer]) -> None:
    trainer = trainer_of(noise_multiplier=1.0)
    before = snapshot(trainer.module)
    frozen = {name for name in before if name.startswith("encoder.stages.1.")}
    with trainer.frozen(frozen), RandomStream(3).active():
        trainer.train_steps(1, None)
    after = snapshot(trainer.module)
    assert {n for n in before if torch.equal(before[n], after[n])} == frozen


def test_micro_batches_change_nothing(trainer_of: Callable[..., PrivateTrainer]) -> None:
    steps = {}
    for physical in (1, 3, None):
        trainer = trainer_of(expected_batch=4, physical_batch=physical, noise_multiplier=0.1)
        with RandomStream(5).active():
            trainer.noise = SeededNoise(2)
            trainer.train_steps(1, None)
        steps[physical] = snapshot(trainer.module)
    for name, one in steps[1].items():
        torch.testing.assert_close(steps[3][name], one, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(steps[None][name], one, rtol=1e-4, atol=1e-6, msg=name)


def test_batches_hold_at_most_the_physical_batch(trainer_of: Callable[..., PrivateTrainer]) -> None:
    trainer = trainer_of(expected_batch=4, physical_batch=3)
    draw = next(trainer.dataloader_train)
    assert [len(batch["data"]) for batch in draw["batches"]] == [3, 1]


def test_optimiser_state_goes_on_to_the_bit(trainer_of: Callable[..., PrivateTrainer]) -> None:
    adam = OptimizerConfig(lr=1e-2)
    steady = trainer_of(adam, noise_multiplier=1.0)
    steady.noise = SeededNoise(4)
    stream = RandomStream(4)
    with stream.active():
        steady.train_steps(1, None)
    tensors, plain = steady.export_state()
    other = trainer_of(adam, seed=2, noise_multiplier=1.0)
    other.noise = copy.deepcopy(steady.noise)
    other.network.load_state_dict(steady.network.state_dict())
    other.load_state({n: t.clone() for n, t in tensors.items()}, plain)
    for trainer in (steady, other):
        with RandomStream(5).active():
            trainer.train_steps(1, None)
    ours, theirs = snapshot(steady.module), snapshot(other.module)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert other.steps_done == 2


def test_the_network_stays_bare(trainer_of: Callable[..., PrivateTrainer]) -> None:
    trainer = trainer_of(expected_batch=4)
    names = [n for n, _ in trainer.module.named_parameters()]
    trainer.train_steps(1, None)
    assert [n for n, _ in trainer.module.named_parameters()] == names
    assert names[0].startswith("encoder.stages.")
    assert not any(module._forward_hooks or module._backward_hooks for module in trainer.module.modules())


def test_a_teacher_sees_one_case_at_a_time(trainer_of: Callable[..., PrivateTrainer]) -> None:
    trainer = trainer_of(expected_batch=4)
    trainer.train_steps(1, None)
    teacher, differences = Teacher(trainer), []
    teacher.follow()

    def hook(loss: Tensor, batch: Batch) -> Tensor:
        differences.append(float((teacher.logits(batch.data) - batch.logits.detach()).abs().max()))
        return loss

    trainer.train_steps(1, hook)
    assert differences == pytest.approx([0.0] * 4, abs=1e-5)


def test_the_loss_is_the_drawn_cases_sum_over_the_expected_batch(trainer_of: Callable[..., PrivateTrainer]) -> None:
    trainer = trainer_of(expected_batch=3)
    cases = full_draw(trainer)
    trainer.loss_hook = lambda loss, batch: 0 * loss + 6
    assert trainer.train_step({"keys": [], "batches": iter(cases)})["loss"] == pytest.approx(4 * 6 / 3)
    assert trainer.train_step({"keys": [], "batches": iter([])})["loss"] == 0


def test_a_gradient_that_is_not_finite_takes_no_step(trainer_of: Callable[..., PrivateTrainer]) -> None:
    trainer = trainer_of(expected_batch=4, noise_multiplier=1.0)
    before = snapshot(trainer.module)
    with pytest.raises(FloatingPointError, match=r"step 1: a case's gradient is not finite"):
        trainer.train_steps(1, lambda loss, batch: loss * float("inf"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(trainer.module).items())


def test_every_case_is_drawn_at_most_once_and_at_the_sampling_rate(
    trainer_of: Callable[..., PrivateTrainer],
) -> None:
    trainer = trainer_of(expected_batch=1)
    training, _ = trainer.validation_cases()
    assert trainer.sampling_rate == 1 / len(training) == 0.25
    trainer.noise, counts, steps = SeededNoise(6), dict.fromkeys(training, 0), 1000
    for _ in range(steps):
        keys = next(trainer.dataloader_train)["keys"]
        assert len(set(keys)) == len(keys)
        for key in keys:
            counts[key] += 1
    bound = 5 * (steps * 0.25 * 0.75) ** 0.5
    assert all(abs(count - 250) < bound for count in counts.values())


def test_draws_are_independent_and_empty_ones_occur() -> None:
    noise, steps = SeededNoise(8), 4000
    draws = [set(poisson_draw("ab", 0.3, noise)) for _ in range(steps)]
    both, none = (sum(draw == wanted for draw in draws) for wanted in ({"a", "b"}, set()))
    assert both == pytest.approx(steps * 0.09, abs=5 * (steps * 0.09 * 0.91) ** 0.5)
    assert none == pytest.approx(steps * 0.49, abs=5 * (steps * 0.49 * 0.51) ** 0.5)
    assert poisson_draw("abc", 1.0, noise) == ["a", "b", "c"]


def test_a_step_trains_on_one_patch_of_each_drawn_case(trainer_of: Callable[..., PrivateTrainer]) -> None:
    trainer = trainer_of(expected_batch=4, physical_batch=3)
    draw = next(trainer.dataloader_train)
    assert sorted(draw["keys"]) == sorted(trainer.validation_cases()[0])
    batches = list(draw["batches"])
    assert [key for batch in batches for key in batch["keys"]] == draw["keys"]
    assert all(len(batch["data"]) == len(batch["target"][0]) == len(batch["keys"]) for batch in batches)


def test_a_case_s_patch_does_not_depend_on_who_else_is_drawn(trainer_of: Callable[..., PrivateTrainer]) -> None:
    trainer, seen = trainer_of(expected_batch=2), []
    for source in range(12):
        with RandomStream(11).active():
            trainer.noise = SeededNoise(source)
            draw = next(trainer.dataloader_train)
            patches = {case["keys"][0]: case for batch in draw["batches"] for case in one_by_one(batch)}
        seen.append(patches)
    case = max(trainer.validation_cases()[0])
    with_it = [patches for patches in seen if case in patches]
    assert len({list(patches).index(case) for patches in with_it}) > 1
    for patches in with_it[1:]:
        assert torch.equal(patches[case]["data"], with_it[0][case]["data"])
        assert torch.equal(patches[case]["target"][0], with_it[0][case]["target"][0])


def test_slices_come_as_nnunet_s_2d_loader_gives_them(trainer_of: Callable[..., PrivateTrainer]) -> None:
    trainer = trainer_of()
    dataset, _ = trainer.get_tr_and_val_datasets()
    stock = nnUNetDataLoader(dataset, 2, (14, 18), (10, 12), trainer.label_manager)
    patch = CaseLoader.like(stock, trainer.label_manager).patch(dataset.identifiers[1], seed=3)
    assert patch["data"].shape == next(stock)["data"][:1].shape == (1, 1, 14, 18)
    assert patch["keys"] == [dataset.identifiers[1]]


def test_foreground_is_forced_at_nnunet_s_rate_in_each_patch_alike(trainer_of: Callable[..., PrivateTrainer]) -> None:
    trainer = trainer_of()
    dataset, _ = trainer.get_tr_and_val_datasets()
    stock = nnUNetDataLoader(dataset, 2, (14, 18), (10, 12), trainer.label_manager, oversample_foreground_percent=0.25)
    loader = CaseLoader.like(stock, trainer.label_manager)
    with RandomStream(12).active():
        forced = sum(loader.get_do_oversample(0) for _ in range(2000))
    assert forced == pytest.approx(500, abs=5 * (2000 * 0.25 * 0.75) ** 0.5)


def test_batch_norm_is_refused_by_name(site: tuple, trainer_of: Callable[..., PrivateTrainer]) -> None:
    plans = copy.deepcopy(site[1])
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments["norm_op"] = "torch.nn.modules.batchnorm.BatchNorm3d"
    with pytest.raises(ValueError, match=r"encoder\.stages\.0\.0\.convs\.0\.norm \(BatchNorm3d\): BatchNorm cannot"):
        trainer_of(plans=plans)


def test_attention_without_gradients_per_case_is_refused_by_name() -> None:
    network = TransUNet3D(1, 2, n_stages=2, features_per_stage=(4, 8), depth=1, heads=2)
    with pytest.raises(ValueError, match=r"encoder\.bottleneck\.layers\.0\.self_attn \(MultiheadAttention\)"):
        check_cases_stay_apart(network)


def test_a_network_of_several_branches_is_refused() -> None:
    with pytest.raises(ValueError, match="the loss of FedMEPDNet is one of several branches"):
        check_cases_stay_apart(FedMEPDNet(1, 2, ["T2"], features_per_stage=(4, 4, 4, 4)))


def test_t28_the_network_passes_opacus_and_its_epsilon_is_that_of_dp_accounting(
    trainer_of: Callable[..., PrivateTrainer],
) -> None:
    trainer = trainer_of(expected_batch=1)
    check_cases_stay_apart(trainer.module)
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(11, 65))
    for noise_multiplier, rate, steps, delta in ((1.0, trainer.sampling_rate, 20, 1e-2), (1.0, 2 / 250, 12500, 1e-3)):
        opacus = RDPAccountant()
        opacus.history = [(noise_multiplier, rate, steps)]
        google = RdpAccountant(orders)
        google.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise_multiplier)), steps)
        expected = opacus.get_epsilon(delta, alphas=orders)
        assert google.get_epsilon(delta) == pytest.approx(expected, rel=0.02)
        assert epsilon([Release(noise_multiplier, rate, steps)], delta, "rdp") == pytest.approx(expected, rel=0.02)


def test_loader_processes_are_refused(
    trainer_of: Callable[..., PrivateTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    with pytest.raises(ValueError, match=r"1 loader processes, expected 0.*Set sites.num_workers to 0"):
        trainer_of()


def test_more_expected_cases_than_there_are_is_refused(trainer_of: Callable[..., PrivateTrainer]) -> None:
    with pytest.raises(ValueError, match=r"expected_batch is 5, expected at most the 4 training cases"):
        trainer_of(expected_batch=5)


@pytest.mark.parametrize(
    ("key", "value"),
    [("clip", 0), ("noise_multiplier", -1), ("noise_multiplier", True), ("expected_batch", 0.5), ("physical_batch", 0)],
)
def test_settings_out_of_range_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"instance_dp: {key} is {value!r}, expected"):
        private(**{key: value})
