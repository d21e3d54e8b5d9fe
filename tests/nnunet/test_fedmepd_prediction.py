"""FedMEPD's oracles of whole-volume prediction: windows and the order of channels, through nnU-Net's predictor."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from fedcmt.nnunet.predict import load_predictor, predict_folder
from tests.nnunet.tiny_model import export_tiny, random_parameters, write_images
from tests.nnunet.tiny_sequences import SEQUENCES, export_sequences, sequence_parameters

CPU = torch.device("cpu")
SHUFFLED = ("FLAIR", "T1ce", "T2", "T1")


@pytest.mark.parametrize(("length", "starts"), [(128, [0, 24, 48]), (80, [0]), (81, [0, 1]), (160, [0, 40, 80])])
def test_oracle_24_windows_start_at_the_ends_and_at_most_half_a_patch_apart(length: int, starts: list[int]) -> None:
    """The released code starts 128 voxels' windows at 0, 40 and 48; nnU-Net spreads as many evenly."""
    assert compute_steps_for_sliding_window((length,) * 3, (80, 80, 80), 0.5) == [starts] * 3


def test_oracle_24_a_constant_predictor_gives_a_constant_map_also_where_the_image_is_smaller_than_a_patch(
    tmp_path: Path,
) -> None:
    """The released code averages probabilities evenly and does not pad; nnU-Net weighs logits by a Gaussian.

    Powers of two, since nnU-Net's weights are half precision and subnormal at a volume's corners, where 2.5 becomes 2.
    """
    heads = {"decoder.seg_layers.1.bias": torch.tensor([2.0, -1.0, 0.0])}
    parameters = {name: torch.zeros_like(tensor) for name, tensor in random_parameters(11).items()}
    assert heads.keys() <= parameters.keys()
    predictor = load_predictor(
        export_tiny(tmp_path, parameters | heads), "checkpoint_final.pth", device=CPU, mirroring=False
    )
    image = torch.randn(4, 26, 16, 11, generator=torch.Generator().manual_seed(0))
    logits = torch.as_tensor(predictor.predict_sliding_window_return_logits(image)).float()
    assert logits.shape == (3, 26, 16, 11)
    for own, expected in zip(logits, (2.0, -1.0, 0.0), strict=True):
        torch.testing.assert_close(own, torch.full_like(own, expected), rtol=0, atol=0)


def test_oracle_27_a_data_set_with_its_channels_in_another_order_gives_the_same_label_map(tmp_path: Path) -> None:
    parameters = sequence_parameters("FedMEPDNet")
    models = {
        order: export_sequences(tmp_path / order[0], "FedMEPDNet", parameters, order) for order in (SEQUENCES, SHUFFLED)
    }
    images = {SEQUENCES: write_images(tmp_path / "usual", ("a",)), SHUFFLED: tmp_path / "shuffled"}
    images[SHUFFLED].mkdir()
    for number, sequence in enumerate(SHUFFLED):
        file = images[SEQUENCES] / f"a_{SEQUENCES.index(sequence):04d}.nii.gz"
        shutil.copy(file, images[SHUFFLED] / f"a_{number:04d}.nii.gz")
    usual, shuffled, confused = (
        sitk.GetArrayFromImage(
            sitk.ReadImage(str(predict_folder(models[m], images[i], tmp_path / f"{m[0]}{i[0]}", device=CPU)[0]))
        )
        for m, i in ((SEQUENCES, SEQUENCES), (SHUFFLED, SHUFFLED), (SHUFFLED, SEQUENCES))
    )
    np.testing.assert_array_equal(usual, shuffled)
    assert len(np.unique(usual)) > 1
    assert not np.array_equal(usual, confused)
