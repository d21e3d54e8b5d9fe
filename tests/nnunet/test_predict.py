import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from fedcmt.data.checks import DatasetError
from fedcmt.nnunet.predict import PredictionInputError, predict_folder
from tests.nnunet.tiny_model import DIRECTION, ORIGIN, SPACING, export_tiny, random_parameters, write_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("raw") / "imagesTs")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("model"), random_parameters(11))


def voxels(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_label_maps_lie_on_their_inputs_grid(
    model: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    steps: list[tuple[int, int]] = []
    written = predict_folder(model, images, tmp_path / "new" / "out", device=CPU, progress=lambda *s: steps.append(s))
    assert [f.name for f in written] == ["a_01.nii.gz", "b_02.nii.gz"]
    assert sorted((tmp_path / "new" / "out").iterdir()) == written
    for file in written:
        image = sitk.ReadImage(str(file))
        assert image.GetSize() == (19, 22, 13)
        np.testing.assert_allclose(image.GetSpacing(), SPACING, atol=1e-5)
        np.testing.assert_allclose(image.GetOrigin(), ORIGIN, atol=1e-5)
        np.testing.assert_allclose(image.GetDirection(), DIRECTION, atol=1e-5)
        assert {0, 3} < set(np.unique(sitk.GetArrayFromImage(image)).tolist()) <= {0, 1, 2, 3}
    assert not np.array_equal(voxels(written[0]), voxels(written[1]))
    assert steps == [(0, 2), (1, 2), (2, 2)]
    assert capfd.readouterr().out == ""


def test_a_changed_encoder_changes_the_prediction(model: Path, images: Path, tmp_path: Path) -> None:
    parameters = random_parameters(11)
    name = "encoder.stages.1.0.convs.0.conv.weight"
    parameters[name] = -parameters[name]
    changed = export_tiny(tmp_path / "model", parameters)
    before = predict_folder(model, images, tmp_path / "before", device=CPU, mirroring=False)
    after = predict_folder(changed, images, tmp_path / "after", device=CPU, mirroring=False)
    assert not np.array_equal(voxels(before[0]), voxels(after[0]))


def test_mirroring_can_be_switched_off_and_old_results_are_replaced(model: Path, images: Path, tmp_path: Path) -> None:
    mirrored = voxels(predict_folder(model, images, tmp_path, device=CPU)[0])
    plain = voxels(predict_folder(model, images, tmp_path, device=CPU, mirroring=False)[0])
    assert not np.array_equal(mirrored, plain)


@pytest.mark.slow
def test_equals_the_stock_command(model: Path, images: Path, tmp_path: Path) -> None:
    """Run where fedcmt cannot be imported, so the folder alone must suffice."""
    command = Path(sys.executable).with_name("nnUNetv2_predict_from_modelfolder")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    absent = subprocess.run(
        [sys.executable, "-c", "import fedcmt"], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert absent.returncode != 0, "fedcmt is installed here; the command must not see it"
    out = tmp_path / "stock"
    arguments = ["-i", images, "-o", out, "-m", model, "-f", "all", "-device", "cpu"]
    subprocess.run([command, *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    for ours in predict_folder(model, images, tmp_path / "ours", device=CPU):
        np.testing.assert_array_equal(voxels(ours), voxels(out / ours.name))
        assert sitk.ReadImage(str(ours)).GetDirection() == sitk.ReadImage(str(out / ours.name)).GetDirection()


def test_failed_write_leaves_nothing_behind(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(image: sitk.Image, path: str, compress: bool) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(sitk, "WriteImage", write_half)
    with pytest.raises(RuntimeError, match="disk full"):
        predict_folder(model, images, tmp_path, device=CPU, mirroring=False)
    assert list(tmp_path.iterdir()) == []


def test_missing_channel_is_named_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "i")
    (images / "b_02_0002.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"b_02_0002\.nii\.gz is missing \(channel 2, 'T2'\)"):
        predict_folder(model, images, tmp_path / "out", device=CPU)
    assert not (tmp_path / "out").exists()


def test_folder_without_images_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="absent does not exist"):
        predict_folder(model, tmp_path / "absent", tmp_path / "out", device=CPU)


def test_damaged_and_misfit_images_are_named(model: Path, tmp_path: Path) -> None:
    file = write_images(tmp_path / "i", ("a",)) / "a_0003.nii.gz"
    whole = sitk.ReadImage(str(file))
    file.write_bytes(b"no image")
    with pytest.raises(PredictionInputError, match=r"a_0003\.nii\.gz: not a readable image"):
        predict_folder(model, tmp_path / "i", tmp_path / "out", device=CPU)
    sitk.WriteImage(whole[:-1], str(file))
    with pytest.raises(PredictionInputError, match=r"a_0003\.nii\.gz: size and spacing .*a_0000\.nii\.gz"):
        predict_folder(model, tmp_path / "i", tmp_path / "out", device=CPU)


def test_truncated_file_is_named_although_itk_reads_it(model: Path, tmp_path: Path) -> None:
    file = write_images(tmp_path / "i", ("a",)) / "a_0003.nii.gz"
    file.write_bytes(file.read_bytes()[:4000])
    sitk.ReadImage(str(file))
    with pytest.raises(PredictionInputError, match=r"a_0003\.nii\.gz: not a readable image or not all of it"):
        predict_folder(model, tmp_path / "i", tmp_path / "out", device=CPU)


def test_a_broken_dataset_json_of_the_model_is_named(images: Path, tmp_path: Path) -> None:
    model = export_tiny(tmp_path / "model", random_parameters(11))
    (model / "dataset.json").write_text("{torn")
    with pytest.raises(PredictionInputError, match=r"dataset\.json: not valid JSON .*Restore the model folder"):
        predict_folder(model, images, tmp_path / "out", device=CPU)


def test_incomplete_model_folder_is_told(model: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(PredictionInputError, match=r"checkpoint_best\.pth: missing"):
        predict_folder(model, images, tmp_path, device=CPU, checkpoint="checkpoint_best.pth")
