import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from fedcmt.data.checks import DatasetError
from fedcmt.evaluation.subsets import SubsetError
from fedcmt.nnunet.predict import PredictionInputError, load_predictor, predict_folder
from tests.nnunet.tiny_model import DIRECTION, ORIGIN, SHAPE, SPACING, export_tiny, random_parameters, write_images
from tests.nnunet.tiny_sequences import LABELS, export_sequences, sequence_parameters

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


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(images: Path, tmp_path: Path) -> None:
    folder, trace = export_tiny(tmp_path / "model", random_parameters(11)), tmp_path / "it_ran"
    checkpoint = folder / "fold_all" / "checkpoint_final.pth"
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "logging": Code(trace)}, checkpoint)
    with pytest.raises(PredictionInputError, match=r"checkpoint_final\.pth: cannot be read as tensors .* holds code"):
        predict_folder(folder, images, tmp_path / "out", device=CPU)
    assert not trace.exists()


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


# ---------------------------------------------------------------------------------------------------------------------
# Some of the sequences

FLAIR_T2 = (2, 3)  # channels of T2 and FLAIR
NETWORKS = ("FedMEPDNet", "MUNet")


@pytest.fixture(scope="module")
def sequence_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: export_sequences(root / name, name, sequence_parameters(name)) for name in NETWORKS}


def write_sequences(folder: Path, cases: tuple[str, ...] = ("a",)) -> Path:
    """Images of which T1ce covers all and the others an ever smaller part of the field of view."""
    write_images(folder, cases)
    for case in cases:
        for channel, start in ((0, 1), (2, 3), (3, 5)):
            file = folder / f"{case}_{channel:04d}.nii.gz"
            image = sitk.ReadImage(str(file))
            image[:start, :, :] = 0
            image[:, :start, :] = 0
            sitk.WriteImage(image, str(file))
    return folder


def without(images: Path, folder: Path, kept: tuple[int, ...], stand_in: str) -> Path:
    """A copy in which the other channels are "absent", "garbage" or "zeros"."""
    folder.mkdir()
    for file in images.iterdir():
        if int(file.name[-11:-7]) in kept:
            (folder / file.name).write_bytes(file.read_bytes())
        elif stand_in == "garbage":
            (folder / file.name).write_bytes(b"no image")
        elif stand_in == "zeros":
            sitk.WriteImage(sitk.ReadImage(str(file)) * 0, str(folder / file.name))
    return folder


def predicted(model: Path, images: Path, output: Path, sequences: tuple[str, ...] | None = None) -> np.ndarray:
    """The label map of the first case."""
    return voxels(predict_folder(model, images, output, device=CPU, sequences=sequences)[0])


@pytest.mark.parametrize("network", NETWORKS)
def test_files_of_other_channels_make_no_difference(
    sequence_models: dict[str, Path], tmp_path: Path, network: str
) -> None:
    model, images = sequence_models[network], write_sequences(tmp_path / "i", ("a", "b"))
    present = predicted(model, images, tmp_path / "present", ("flair", "T2w"))
    for stand_in in ("absent", "garbage"):
        folder = without(images, tmp_path / stand_in, FLAIR_T2, stand_in)
        written = predict_folder(model, folder, tmp_path / f"out-{stand_in}", device=CPU, sequences=["T2", "FLAIR"])
        assert [file.name for file in written] == ["a.nii.gz", "b.nii.gz"]
        np.testing.assert_array_equal(voxels(written[0]), present)
    assert set(np.unique(present)) == set(LABELS.values())
    assert not np.array_equal(present, predicted(model, images, tmp_path / "all"))
    assert not np.array_equal(present, predicted(model, images, tmp_path / "other", ("T2",)))


@pytest.mark.parametrize("network", NETWORKS)
def test_all_sequences_by_name_give_the_ordinary_label_map(
    sequence_models: dict[str, Path], tmp_path: Path, network: str
) -> None:
    model, images = sequence_models[network], write_sequences(tmp_path / "i")
    named = predicted(model, images, tmp_path / "named", ("T1", "T2", "T1ce", "FLAIR"))
    np.testing.assert_array_equal(named, predicted(model, images, tmp_path / "all"))


def test_munet_sees_what_images_of_zeros_give(sequence_models: dict[str, Path], tmp_path: Path) -> None:
    model, images = sequence_models["MUNet"], write_sequences(tmp_path / "i")
    zeros = without(images, tmp_path / "zeros", FLAIR_T2, "zeros")
    ours = predicted(model, images, tmp_path / "ours", ("FLAIR", "T2"))
    np.testing.assert_array_equal(ours, predicted(model, zeros, tmp_path / "expected"))


def test_fedmepd_gives_the_label_map_of_its_network_under_only(
    sequence_models: dict[str, Path], tmp_path: Path
) -> None:
    model, images = sequence_models["FedMEPDNet"], write_sequences(tmp_path / "i")
    predictor = load_predictor(model, "checkpoint_final.pth", device=CPU, mirroring=False)
    reader = predictor.plans_manager.image_reader_writer_class()
    image, geometry = reader.read_images([str(images / f"a_{c:04d}.nii.gz") for c in range(4)])
    assert image.shape == (4, *SHAPE)
    image[0] = image[1] = 0  # T1 and T1ce
    with predictor.network.only(["FLAIR", "T2"]):
        expected = predictor.predict_single_npy_array(image, geometry, None, None, False)
    ours = predicted(model, images, tmp_path / "ours", ("FLAIR", "T2"))
    np.testing.assert_array_equal(ours, expected)
    everything = predictor.predict_single_npy_array(image, geometry, None, None, False)
    assert not np.array_equal(ours, everything), "encoders that see zeros do have a part in the result"


def test_encoders_of_other_sequences_do_not_run(sequence_models: dict[str, Path], tmp_path: Path) -> None:
    images, parameters = write_sequences(tmp_path / "i"), sequence_parameters("FedMEPDNet")
    for name, tensor in parameters.items():
        if name.startswith(("encoders.T1.", "encoders.T1ce.")):
            tensor.fill_(torch.nan)
    broken = export_sequences(tmp_path / "model", "FedMEPDNet", parameters)
    ours = predicted(broken, images, tmp_path / "ours", ("T2", "FLAIR"))
    whole = sequence_models["FedMEPDNet"]
    np.testing.assert_array_equal(ours, predicted(whole, images, tmp_path / "expected", ("FLAIR", "T2")))


def test_a_network_that_needs_every_channel_is_told(model: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(PredictionInputError, match="a PlainConvUNet, which needs every channel, not FLAIR, T2 alone"):
        predict_folder(model, images, tmp_path / "out", device=CPU, sequences=["T2", "FLAIR"])
    assert not (tmp_path / "out").exists()


def test_a_sequence_the_model_lacks_is_told_before_it_is_loaded(images: Path, tmp_path: Path) -> None:
    model = export_tiny(tmp_path / "model", random_parameters(11))
    (model / "fold_all" / "checkpoint_final.pth").write_bytes(b"not to be opened")
    with pytest.raises(SubsetError, match=r"channels \['ADC'\], expected .*\['T1', 'T1ce', 'T2', 'FLAIR'\]"):
        predict_folder(model, images, tmp_path / "out", device=CPU, sequences=["ADC"])


def test_a_chosen_channel_that_is_missing_is_named(sequence_models: dict[str, Path], tmp_path: Path) -> None:
    model, images = sequence_models["MUNet"], write_sequences(tmp_path / "i", ("a", "b"))
    (images / "b_0003.nii.gz").unlink()
    with pytest.raises(
        DatasetError, match=r"i: 1 problem in .*\n- i/b_0003\.nii\.gz is missing \(channel 3, 'FLAIR'\)"
    ):
        predict_folder(model, images, tmp_path / "out", device=CPU, sequences=["T2", "FLAIR"])
    (images / "b_0002.nii.gz").write_bytes(b"no image")
    with pytest.raises(PredictionInputError, match=r"b_0002\.nii\.gz: not a readable image"):
        predict_folder(model, images, tmp_path / "out", device=CPU, sequences=["T2"])
    with pytest.raises(DatasetError, match="absent holds no images"):
        predict_folder(model, tmp_path / "absent", tmp_path / "out", device=CPU, sequences=["T2"])


def test_a_case_without_content_in_the_chosen_channels_is_named(
    sequence_models: dict[str, Path], tmp_path: Path
) -> None:
    model, images = sequence_models["MUNet"], write_sequences(tmp_path / "i")
    zeros = without(images, tmp_path / "zeros", FLAIR_T2, "zeros")
    with pytest.raises(PredictionInputError, match="case a: zero everywhere in T1, so there is nothing"):
        predict_folder(model, zeros, tmp_path / "out", device=CPU, sequences=["T1"])
