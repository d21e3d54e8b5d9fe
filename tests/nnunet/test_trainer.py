"""nnU-Net's trainer driven step by step, on a tiny data set."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform

from fedcmt.config import OptimizerConfig
from fedcmt.data.checks import DatasetError
from fedcmt.nnunet.paths import nnunet_paths
from fedcmt.nnunet.teacher import Teacher
from fedcmt.nnunet.trainer import Batch, MissingStaysMissing, SiteTrainer, build_trainer
from fedcmt.params import snapshot
from fedcmt.randomness import RandomStream
from tests.nnunet.tiny_site import make_site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict]:
    """nnU-Net's folders, installed plans and dataset.json of a small data set."""
    return make_site(tmp_path_factory.mktemp("site"))


def trainer_of(
    site: tuple[Path, dict, dict], monkeypatch: pytest.MonkeyPatch, seed: int = 1, **changes: Any
) -> SiteTrainer:
    root, plans, dataset_json = site
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    settings: dict[str, Any] = {"optimizer": OptimizerConfig(lr=1e-2), "grad_clip": 1.0, "total_steps": 4}
    with nnunet_paths(preprocessed=root / "preprocessed", results=root / "results"):
        return build_trainer(
            plans,
            dataset_json,
            configuration="3d_fullres",
            fold=0,
            device=torch.device("cpu"),
            seed=seed,
            **(settings | changes),
        )


def test_the_seed_decides_the_initial_network(site: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    one, same, other = (snapshot(trainer_of(site, monkeypatch, seed=s).module) for s in (1, 1, 2))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_validation_repeats_and_leaves_training_s_random_numbers_alone(
    site: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(site, monkeypatch)
    with RandomStream(9).active():
        first, second = trainer.validate(2), trainer.validate(2)
        drawn = torch.rand(3)
    with RandomStream(9).active():
        assert torch.equal(torch.rand(3), drawn)
    assert first == second
    assert 0 <= first <= 1


def test_every_step_s_loss_goes_through_the_hook(site: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(site, monkeypatch)
    seen: list[Batch] = []

    def hook(loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        seen.append(batch)
        return 0 * loss

    before = snapshot(trainer.module)
    assert trainer.train_steps(2, hook) == 0
    assert len(seen) == 2
    patch = seen[0].data.shape[2:]
    assert seen[0].logits.shape == (2, 3, *patch)  # full resolution, although deep supervision gives more
    assert seen[0].target.shape == (2, 3, *patch)  # one channel per region
    assert seen[0].valid is None
    # Without a gradient, AdamW only decays weights: 1 - lr * weight_decay twice.
    name = "encoder.stages.0.0.convs.0.conv.weight"
    torch.testing.assert_close(snapshot(trainer.module)[name], before[name] * (1 - 1e-2 * 1e-5) ** 2)


def test_the_gradient_is_clipped_to_the_site_s_norm(site: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    sgd = OptimizerConfig("SGD", lr=1.0, weight_decay=0.0)
    trainer = trainer_of(site, monkeypatch, optimizer=sgd, grad_clip=1e-3)
    before = snapshot(trainer.module)
    trainer.train_steps(1, lambda loss, batch: 1e4 * loss)
    moved = torch.cat([(t - before[n]).flatten() for n, t in snapshot(trainer.module).items()])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_the_poly_rate_follows_the_job_s_steps_and_never_turns_complex(
    site: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(site, monkeypatch, optimizer=OptimizerConfig("SGD", lr=1.0, schedule="poly"))
    rates = []
    trainer.train_steps(6, lambda loss, batch: 0 * loss, lambda step, loss: rates.append(trainer.learning_rate))
    # 4 steps in all: (1 - k / 4)^0.9, held at the last one's rate.
    expected = [(1 - k / 4) ** 0.9 for k in (0, 1, 2, 3, 3, 3)]
    assert rates == pytest.approx(expected)


def test_optimiser_state_goes_on_where_it_was(site: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    steady = trainer_of(site, monkeypatch)
    stream = RandomStream(4)
    with stream.active():
        steady.train_steps(1, None)
    tensors, plain = steady.export_state()
    other = trainer_of(site, monkeypatch, seed=2)
    other.network.load_state_dict(steady.network.state_dict())
    other.load_state({n: t.clone() for n, t in tensors.items()}, plain)
    for trainer in (steady, other):
        with RandomStream(5).active():
            trainer.train_steps(1, None)
    ours, theirs = snapshot(steady.module), snapshot(other.module)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert other.steps_done == 2


def test_a_network_of_two_stages_trains_without_deep_supervision(
    site: tuple[Path, dict, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, plans, dataset_json = site
    shallow = copy.deepcopy(plans)
    arguments = shallow["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments["n_stages"] = 2
    for key in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
        arguments[key] = arguments[key][:2]
    arguments["n_conv_per_stage_decoder"] = arguments["n_conv_per_stage_decoder"][:1]
    trainer = trainer_of((root, shallow, dataset_json), monkeypatch)
    assert math.isfinite(trainer.train_steps(1, None))
    assert 0 <= trainer.validate(1) <= 1


def test_frozen_parameters_stay_to_the_bit_and_train_again_afterwards(
    site: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(site, monkeypatch)
    before = snapshot(trainer.module)
    frozen = {name for name in before if name.startswith("encoder.stages.1.")}
    with trainer.frozen(frozen):
        trainer.train_steps(1, None)
    during = snapshot(trainer.module)
    still = {n for n in before if torch.equal(before[n], during[n])}
    # Deep supervision gives the lowest resolution's output no weight.
    assert {n for n in still if not n.startswith("decoder.seg_layers.0.")} == frozen
    trainer.train_steps(1, None)
    after = snapshot(trainer.module)
    assert not any(torch.equal(during[n], after[n]) for n in frozen)


def test_the_teacher_gives_the_logits_of_the_moment_it_followed(site: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(site, monkeypatch)
    teacher, differences = Teacher(trainer), []

    def hook(loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        logits = teacher.logits(batch.data)
        assert not logits.requires_grad
        differences.append(float((logits - batch.logits.detach()).abs().max()))
        return loss

    trainer.train_steps(2, hook)
    teacher.follow()
    trainer.train_steps(1, hook)
    assert differences[0] == pytest.approx(0, abs=1e-5)
    assert differences[1] > 1e-3
    assert differences[2] == pytest.approx(0, abs=1e-5)


def mirrored_axes(trainer: SiteTrainer) -> list[tuple[int, ...]]:
    transforms = trainer.dataloader_train.data_loader.transforms.transforms
    return [tuple(t.allowed_axes) for t in transforms if isinstance(t, MirrorTransform)]


@pytest.mark.parametrize(
    ("given", "training", "prediction"), [(None, [(0, 1, 2)], (0, 1, 2)), ([0, 1], [(0, 1)], (0, 1)), ([], [], ())]
)
def test_patches_are_mirrored_along_the_site_s_axes_only(
    site: tuple[Path, dict, dict],
    monkeypatch: pytest.MonkeyPatch,
    given: list[int] | None,
    training: list[tuple[int, ...]],
    prediction: tuple[int, ...],
) -> None:
    trainer = trainer_of(site, monkeypatch, mirror_axes=given)
    assert mirrored_axes(trainer) == training
    assert trainer.inference_allowed_mirroring_axes == prediction


def test_an_axis_that_patches_do_not_have_is_refused(
    site: tuple[Path, dict, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"mirror_axes is \[3\]; patches of this site have axes \[0, 1, 2\]"):
        trainer_of(site, monkeypatch, mirror_axes=[3])


@pytest.mark.parametrize("stages", [3, 2])  # with and without deep supervision
def test_the_loss_can_be_one_minus_soft_dice(
    site: tuple[Path, dict, dict], monkeypatch: pytest.MonkeyPatch, stages: int
) -> None:
    root, plans, dataset_json = site
    plans = copy.deepcopy(plans)
    architecture = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    for key, value in architecture.items():
        if isinstance(value, list):
            architecture[key] = value[: stages - 1 if "decoder" in key else stages]
    architecture["n_stages"] = stages
    trainer = trainer_of((root, plans, dataset_json), monkeypatch, loss="dice")
    sizes = [(16, 16, 24), (8, 8, 12)][: stages - 1]
    target = [torch.zeros(1, 3, *size) for size in sizes]
    for level in target:
        level[:, :, :4] = 1  # a quarter or half of the volume, in every region
    right = [40 * (2 * level - 1) for level in target]
    wrong = [40 * (1 - 2 * level) for level in target]
    output = (lambda levels: levels) if stages == 3 else (lambda levels: levels[0])
    assert float(trainer.task_loss(output(right), output(target))) == pytest.approx(0, abs=1e-5)
    assert float(trainer.task_loss(output(wrong), output(target))) == pytest.approx(1, abs=1e-5)


def test_the_published_loss_of_munet_is_refused_for_regions(
    site: tuple[Path, dict, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DatasetError, match="labels that exclude each other; this data set has regions"):
        trainer_of(site, monkeypatch, loss="fedmunet")


def with_split(site: tuple[Path, dict, dict], folds: list[dict]) -> Path:
    """The data set's splits_final.json where nnU-Net reads it."""
    root, plans, _ = site
    file = root / "preprocessed" / plans["dataset_name"] / "splits_final.json"
    file.write_text(json.dumps(folds))
    return file


def test_the_data_set_s_own_split_decides_who_validates(
    site: tuple[Path, dict, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = sorted(trainer_of(site, monkeypatch).dataset_class.get_identifiers(folder_of(site)))
    file = with_split(site, [{"train": cases[:2], "val": cases[2:3]}])
    try:
        trainer = trainer_of(site, monkeypatch)
        assert trainer.do_split() == (cases[:2], cases[2:3])
        trainer.dataset_class = None  # as before `initialize`
        assert trainer.do_split() == (cases[:2], cases[2:3])
        trainer.fold = 1
        with pytest.raises(DatasetError, match=r"has 1 folds, fold is 1; set sites.fold to 0 to 0"):
            trainer.do_split()
        with_split(site, [{"train": [*cases[:2], "nobody"], "val": cases[2:3]}])
        with pytest.raises(DatasetError, match=r"names 1 cases that imagesTr does not hold: \['nobody'\]"):
            trainer_of(site, monkeypatch)
    finally:
        file.unlink()


def folder_of(site: tuple[Path, dict, dict]) -> str:
    root, plans, _ = site
    identifier = plans["configurations"]["3d_fullres"]["data_identifier"]
    return str(root / "preprocessed" / plans["dataset_name"] / identifier)


def test_a_channel_of_zeros_stays_at_zero_through_augmentation() -> None:
    def noise(**patch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**patch, "image": patch["image"] + 1}

    image = torch.zeros(3, 2, 2, 4)
    image[1, 0, 0, 1] = 5
    augmented = MissingStaysMissing(noise)(image=image, segmentation=torch.ones(1, 2, 2, 4))
    assert augmented["image"][[0, 2]].abs().sum() == 0
    assert torch.equal(augmented["image"][1], image[1] + 1)
    assert augmented["segmentation"].sum() == 16


@pytest.mark.parametrize("missing_channels", [True, False])
def test_missing_channels_stay_missing_only_where_the_site_says_so(
    site: tuple[Path, dict, dict], monkeypatch: pytest.MonkeyPatch, missing_channels: bool
) -> None:
    trainer = trainer_of(site, monkeypatch, missing_channels=missing_channels)
    loader = trainer.dataloader_train.data_loader
    assert isinstance(loader.transforms, MissingStaysMissing) is missing_channels
