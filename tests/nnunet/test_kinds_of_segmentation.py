"""Labels, regions, and both with an ignore label: each trains, distils, and says where its target counts."""

import json
import math
from pathlib import Path

import pytest
import SimpleITK as sitk
import torch

from fedcmt.algorithms.distillation import Distillation
from fedcmt.config import OptimizerConfig
from fedcmt.json_file import read_json
from fedcmt.nnunet.fingerprint import bin_policy
from fedcmt.nnunet.paths import nnunet_paths
from fedcmt.nnunet.planning_options import PlanningOptions
from fedcmt.nnunet.plans import plan_federation
from fedcmt.nnunet.site_data import own_fingerprint, prepare_data
from fedcmt.nnunet.teacher import Teacher
from fedcmt.nnunet.trainer import Batch, SiteTrainer, build_trainer
from tests.nnunet.tiny_data import geometries, write_dataset

OPTIONS = PlanningOptions(
    mode="architecture", base_features=4, max_features=8, max_stages=3, max_patch_size=(16, 16, 24), batch_size=2
)
KINDS = {
    "labels": {"background": 0, "a": 1, "b": 2},
    "labels with ignore": {"background": 0, "a": 1, "ignore": 2},
    "regions": {"background": 0, "whole": [1, 2], "part": 2},
    "regions with ignore": {"background": 0, "whole": [1, 2], "part": 2, "ignore": 3},
}
OUTPUTS = {"labels": 3, "labels with ignore": 2, "regions": 2, "regions with ignore": 2}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def trainer(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteTrainer:
    labels = KINDS[kind]
    dataset = write_dataset(
        tmp_path / "raw" / "Dataset703_Kinds", geometries(5, (20, 24, 28), (1.0, 1.0, 1.0)), labels=labels
    )
    if kind == "regions with ignore":
        for path in (dataset / "labelsTr").iterdir():
            _ignore_half(path)
    if "regions" in kind:
        order = [max(v) if isinstance(v, list) else v for n, v in labels.items() if n not in ("background", "ignore")]
        content = read_json(dataset / "dataset.json") | {"regions_class_order": order}
        (dataset / "dataset.json").write_text(json.dumps(content))
    fingerprint = own_fingerprint(dataset, OPTIONS)
    plans = plan_federation({"s": fingerprint.coarsened(bin_policy("architecture"))}, OPTIONS)["s"]
    own = prepare_data(plans, fingerprint, dataset, tmp_path / "preprocessed", OPTIONS, site="s", job="j")
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    with nnunet_paths(preprocessed=tmp_path / "preprocessed", results=tmp_path / "results"):
        return build_trainer(
            own,
            read_json(dataset / "dataset.json"),
            configuration="3d_fullres",
            fold=0,
            device=torch.device("cpu"),
            optimizer=OptimizerConfig(lr=1e-2),
            grad_clip=1.0,
            total_steps=4,
            seed=1,
        )


def _ignore_half(path: Path) -> None:
    """Label 2 becomes 3, the ignore label, on one side."""
    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)
    array[:, 12:][array[:, 12:] == 2] = 3
    changed = sitk.GetImageFromArray(array)
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(path))


def test_a_step_sees_logits_target_and_where_it_counts(trainer: SiteTrainer, kind: str) -> None:
    batches: list[Batch] = []

    def hook(loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        batches.append(batch)
        return loss

    assert math.isfinite(trainer.train_steps(3, hook))
    batch = batches[0]
    spatial = batch.data.shape[2:]
    assert batch.logits.shape == (2, OUTPUTS[kind], *spatial)
    assert batch.target.shape == (2, OUTPUTS[kind] if "regions" in kind else 1, *spatial)
    assert trainer.regions == ("regions" in kind)
    if "ignore" not in kind:
        assert batch.valid is None
        return
    counted = torch.stack([b.valid for b in batches if b.valid is not None])
    assert counted.shape == (3, 2, *spatial)
    assert 0 < float(counted.float().mean()) < 1  # some voxels of the box are to be ignored
    if "labels" in kind:
        assert all(bool((b.target[:, 0][b.valid] < 2).all()) for b in batches)


def test_ignored_voxels_say_nothing_in_distillation(trainer: SiteTrainer, kind: str) -> None:
    teacher, seen = Teacher(trainer), []

    def hook(loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        term = Distillation().divergence(
            batch.logits, teacher.logits(batch.data), regions=trainer.regions, valid=batch.valid
        )
        (gradient,) = torch.autograd.grad(term, batch.logits, retain_graph=True)
        ignored = torch.zeros_like(gradient[:, 0], dtype=torch.bool) if batch.valid is None else ~batch.valid
        seen.append((float(term.detach()), float(gradient.abs().sum(1)[ignored].sum()), float(gradient.abs().max())))
        return loss + term

    trainer.train_steps(3, hook)
    assert seen[0][0] == pytest.approx(0, abs=1e-5)  # student and teacher are one at the first step
    assert seen[-1][0] > 1e-5
    assert seen[-1][2] > 0
    assert all(on_ignored == 0 for _, on_ignored, _ in seen)
