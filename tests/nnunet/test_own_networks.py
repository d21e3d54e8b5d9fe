"""The networks that nnU-Net lacks, planned, through training, export and both ways of prediction."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)
from torch import Tensor

from fedcmt.config import OptimizerConfig
from fedcmt.data.classes import CaseClasses
from fedcmt.data.phantoms import make_brain_mr
from fedcmt.json_file import read_json
from fedcmt.nnunet.classifier import classifier_of
from fedcmt.nnunet.export import export_model_folder, stock_network
from fedcmt.nnunet.fingerprint import bin_policy
from fedcmt.nnunet.network import build_network
from fedcmt.nnunet.paths import nnunet_paths
from fedcmt.nnunet.planning_options import NETWORKS, PlanningOptions
from fedcmt.nnunet.plans import plan_federation
from fedcmt.nnunet.predict import predict_folder
from fedcmt.nnunet.site_data import own_fingerprint, prepare_data
from fedcmt.nnunet.teacher import Teacher
from fedcmt.nnunet.trainer import Batch, SiteTrainer, build_trainer
from fedcmt.params import ParameterError, copy_into, snapshot

HEAD_BIAS = re.compile(r"(head|decoder\.seg_layers\.\d+)\.bias")
SOURCE = Path(__file__).parents[2] / "src"
CPU = torch.device("cpu")
CLASS_NAMES = {
    "UNet3D": "fedcmt.models.unet3d.UNet3D",
    "TransUNet3D": "fedcmt.models.trans_unet3d.TransUNet3D",
    "MUNet": "fedcmt.models.munet.MUNet",
}
ONE_OUTPUT = ("UNet3D", "TransUNet3D")
OPTIONS: dict[str, dict[str, Any]] = {
    "UNet3D": {"network": "UNet3D", "max_stages": 3},
    "TransUNet3D": {"network": "TransUNet3D", "max_stages": 3},
    "MUNet-2d": {"network": "MUNet", "max_stages": 2, "configuration": "2d"},
    "MUNet-3d": {
        "network": "MUNet", "max_stages": 2, "network_options": {"norm": "group", "cmm_norm": "pre_ln"},
    },
}  # fmt: skip


class Site:
    """A small data set planned and prepared for one of the networks."""

    def __init__(self, root: Path, changes: dict[str, Any]) -> None:
        self.root = root
        self.dataset = make_brain_mr(
            root / "raw" / "Dataset702_Tiny",
            num_train=5,
            num_test=1,
            seed=3,
            style="site_a",
            channels=("FLAIR", "T1"),
            shape_vox=(24, 28, 20),
        )
        options = PlanningOptions(base_features=4, max_features=8, max_patch_size=(16, 16, 24), batch_size=2, **changes)
        self.network, self.configuration = options.network, options.configuration
        self.one_output = self.network in ONE_OUTPUT
        fingerprint = own_fingerprint(self.dataset, options)
        plans = plan_federation({"s": fingerprint.coarsened(bin_policy("consensus"))}, options)["s"]
        self.plans = prepare_data(plans, fingerprint, self.dataset, root / "preprocessed", options, site="s", job="j")
        self.dataset_json = read_json(self.dataset / "dataset.json")

    def trainer(self, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> SiteTrainer:
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        settings: dict[str, Any] = {"optimizer": OptimizerConfig(lr=1e-2), "grad_clip": 1.0, "total_steps": 4}
        with nnunet_paths(preprocessed=self.root / "preprocessed", results=self.root / "results"):
            return build_trainer(
                self.plans,
                self.dataset_json,
                configuration=self.configuration,
                device=CPU,
                seed=1,
                **(settings | {"fold": 0} | changes),
            )

    def parameters(self) -> dict[str, Tensor]:
        """Drawn wide, so that label maps differ from voxel to voxel."""
        generator = torch.Generator().manual_seed(5)
        own = snapshot(stock_network(self.plans, self.dataset_json, self.configuration))
        drawn = {name: t + 0.3 * torch.randn(t.shape, generator=generator) for name, t in own.items()}
        return drawn | {name: torch.zeros_like(own[name]) for name in own if HEAD_BIAS.match(name)}

    def export(self, folder: Path, parameters: dict[str, Tensor]) -> Path:
        return export_model_folder(
            folder,
            plans=self.plans,
            dataset_json=self.dataset_json,
            configuration=self.configuration,
            mirroring_axes=(0, 1),
            checkpoints={"final": parameters},
        )

    @property
    def chosen(self) -> dict[str, Any]:
        return self.plans["configurations"][self.configuration]


@pytest.fixture(scope="module", params=list(OPTIONS))
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"), OPTIONS[request.param])


def voxels(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_training_moves_every_parameter_and_sees_full_resolution(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = site.trainer(monkeypatch)
    assert type(trainer.module) is NETWORKS[site.network]
    seen: list[Batch] = []

    def hook(loss: Tensor, batch: Batch) -> Tensor:
        seen.append(batch)
        return loss

    before = snapshot(trainer.module)
    assert np.isfinite(trainer.train_steps(2, hook))
    after = snapshot(trainer.module)
    still = {name for name in before if torch.equal(before[name], after[name])}
    # Instance norm takes away the biases before it, and leaves them no gradient but rounding.
    # nnU-Net's deep supervision gives the lowest output no weight.
    lowest = () if site.one_output else ("decoder.seg_layers.0.",)
    assert not [name for name in still if not name.endswith("conv.bias") and not name.startswith(lowest)]
    patch = tuple(site.chosen["patch_size"])
    assert seen[0].logits.shape == seen[0].target.shape == (2, 3, *patch)
    assert 0 <= trainer.validate(2) <= 1


def test_the_teacher_gives_the_logits_of_the_trained_network(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = site.trainer(monkeypatch)
    teacher = Teacher(trainer)

    def hook(loss: Tensor, batch: Batch) -> Tensor:
        torch.testing.assert_close(teacher.logits(batch.data), batch.logits.detach(), rtol=1e-3, atol=1e-3)
        return loss

    trainer.train_steps(1, hook)
    with pytest.raises(AssertionError):
        trainer.train_steps(1, hook)
    teacher.follow()
    trainer.train_steps(1, hook)


def test_a_classifier_pools_the_one_output(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = sorted(f.name.removesuffix(".nii.gz") for f in (site.dataset / "labelsTr").iterdir())
    classes = CaseClasses(("none", "cyst"), {case: index % 2 for index, case in enumerate(cases)})
    trainer = site.trainer(monkeypatch, fold="all", make=classifier_of(classes))

    def hook(loss: Tensor, batch: Batch) -> Tensor:
        assert batch.logits.shape == (2, 2)
        return loss

    assert np.isfinite(trainer.train_steps(1, hook))
    assert 0 <= trainer.validate(1) <= 1


def stock_trainer(site: Site, kind: type[nnUNetTrainer], monkeypatch: pytest.MonkeyPatch) -> nnUNetTrainer:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    plans = {**site.plans, "continue_training": False}  # which nnU-Net takes out of the dict it is given
    with nnunet_paths(preprocessed=site.root / "preprocessed", results=site.root / "results"):
        trainer = kind(plans, site.configuration, 0, site.dataset_json, CPU)
        trainer.initialize()
        trainer.dataloader_train, _ = trainer.get_dataloaders()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    return trainer


def test_stock_nnunet_trains_the_network_without_deep_supervision(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = stock_trainer(site, nnUNetTrainerNoDeepSupervision, monkeypatch)
    assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])


def test_stock_nnunet_s_deep_supervision_is_for_networks_of_several_outputs(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    if site.one_output:
        with pytest.raises(ValueError, match=f"{site.network}: deep_supervision is true.*NoDeepSupervision"):
            stock_trainer(site, nnUNetTrainer, monkeypatch)
        return
    trainer = stock_trainer(site, nnUNetTrainer, monkeypatch)
    batch = next(trainer.dataloader_train)
    assert [t.shape[2:] for t in batch["target"]] == [o.shape[2:] for o in trainer.network(batch["data"])]
    assert np.isfinite(trainer.train_step(batch)["loss"])


def test_the_exported_checkpoint_holds_each_parameter_once_and_plain_values(site: Site, tmp_path: Path) -> None:
    parameters = site.parameters()
    folder = site.export(tmp_path, parameters)
    plans = json.loads((folder / "plans.json").read_text())
    architecture = plans["configurations"][site.configuration]["architecture"]
    assert architecture["network_class_name"] == CLASS_NAMES[site.network]
    checkpoint = torch.load(folder / "fold_all" / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert checkpoint["network_weights"].keys() == parameters.keys()
    assert all(torch.equal(checkpoint["network_weights"][name], tensor) for name, tensor in parameters.items())


def test_a_parameter_that_is_missing_is_named(site: Site, tmp_path: Path) -> None:
    parameters = site.parameters()
    last = list(parameters)[-1]
    del parameters[last]
    with pytest.raises(ParameterError, match=re.escape(last)):
        site.export(tmp_path / "m", parameters)
    assert not (tmp_path / "m").exists()


def test_nnunet_s_own_predictor_gives_the_project_s_label_maps(site: Site, tmp_path: Path) -> None:
    parameters = site.parameters()
    model = site.export(tmp_path / "model", parameters)
    [ours] = predict_folder(model, site.dataset / "imagesTs", tmp_path / "ours", device=CPU)
    predictor = nnUNetPredictor(perform_everything_on_device=False, device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), use_folds=("all",))
    assert type(predictor.network) is NETWORKS[site.network]
    assert all(torch.equal(t, parameters[name]) for name, t in snapshot(predictor.network).items())
    (tmp_path / "stock").mkdir()
    predictor.predict_from_files_sequential(str(site.dataset / "imagesTs"), str(tmp_path / "stock"))
    np.testing.assert_array_equal(voxels(ours), voxels(tmp_path / "stock" / ours.name))
    assert len(np.unique(voxels(ours))) > 1


def test_nnunet_s_own_predictor_has_the_logits_of_training(site: Site, tmp_path: Path) -> None:
    trained = build_network(site.plans, site.configuration, 2, site.dataset_json)
    copy_into(trained, site.parameters())
    patch = torch.randn(1, 2, *site.chosen["patch_size"], generator=torch.Generator().manual_seed(6))
    expected = trained(patch) if site.one_output else trained(patch)[0]
    predictor = nnUNetPredictor(perform_everything_on_device=False, device=CPU, allow_tqdm=False)
    model = site.export(tmp_path, site.parameters())
    predictor.initialize_from_trained_model_folder(str(model), use_folds=("all",))
    assert torch.equal(predictor.network(patch), expected)


def test_equals_the_stock_command_where_fedcmt_can_be_imported(site: Site, tmp_path: Path) -> None:
    model, images, out = site.export(tmp_path / "model", site.parameters()), site.dataset / "imagesTs", tmp_path / "out"
    command = Path(sys.executable).with_name("nnUNetv2_predict_from_modelfolder")
    arguments = ["-i", images, "-o", out, "-m", model, "-f", "all", "-device", "cpu", "-npp", "1", "-nps", "1"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    subprocess.run([command, *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    [ours] = predict_folder(model, images, tmp_path / "ours", device=CPU)
    np.testing.assert_array_equal(voxels(ours), voxels(out / ours.name))
