"""Label maps of a folder of images from an exported model, in this process, equal to those of stock nnU-Net."""

import contextlib
import gzip
import io
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from fedcmt.data.checks import list_cases
from fedcmt.json_file import JsonFileError, read_json
from fedcmt.nnunet.export import CLASSES_FILE
from fedcmt.nnunet.normalization import with_own_schemes

log = logging.getLogger(__name__)


class PredictionInputError(ValueError):
    """A model folder or images that cannot be used."""


def predict_folder(
    model_folder: Path,
    images: Path,
    output: Path,
    *,
    device: torch.device,
    checkpoint: str = "checkpoint_final.pth",
    mirroring: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Segment every case of a folder.

    Gives the label maps of ``nnUNetv2_predict_from_modelfolder -f all`` with its default settings (half-patch steps,
    Gaussian weights, mirroring), but without worker processes. Everything is checked before the first case; a label map
    appears under its name only when complete, and replaces an older one.

    Args:
      model_folder: Holds ``plans.json``, ``dataset.json`` and ``fold_all/<checkpoint>``. The checkpoint is unpickled:
        load only models you trust.
      images: Files ``<case>_0000.nii.gz``, one per channel (the ending is dataset.json's ``file_ending``).
      output: Folder for ``<case>.nii.gz``; created if needed.
      device: Where to run. On CUDA nnU-Net also sets cuDNN's benchmark mode.
      checkpoint: File name.
      mirroring: Average over mirrored inputs along the axes the checkpoint allows; slower (8 times in 3d).
      progress: Called with (cases done, cases in all), at first with 0.

    Returns:
      The label maps, by case name: each with the size, spacing, origin and direction of its input.

    Raises:
      DatasetError: If there are no images, or a case lacks a channel or has one too many; names the files.
      PredictionInputError: If the model folder lacks a file or its dataset.json is broken, the model is a classifier or
        a cascade, or an image cannot be read in full or does not fit the other channels of its case.
      OSError: If ``output`` cannot be written.
    """
    dataset_json = check_model(model_folder, checkpoint)
    if (model_folder / CLASSES_FILE).is_file():
        raise PredictionInputError(
            f"{model_folder}: a classification model, which gives probabilities and no label maps. Use classify_folder."
        )
    cases = check_images(images, dataset_json)
    output.mkdir(parents=True, exist_ok=True)
    predictor = load_predictor(model_folder, checkpoint, device=device, mirroring=mirroring)
    writer = predictor.plans_manager.image_reader_writer_class()
    written = []
    for case, image, properties in read_cases(predictor, cases, progress):
        label_map = predictor.predict_single_npy_array(image, properties, None, None, False)
        written.append(_write(writer, label_map, output / f"{case}{dataset_json['file_ending']}", properties))
    return written


def check_model(folder: Path, checkpoint: str) -> dict:
    """The model's dataset.json, once everything that nnU-Net will open is there.

    Raises:
      PredictionInputError: If a file is missing or dataset.json is broken.
    """
    for name in ("plans.json", "dataset.json", f"fold_all/{checkpoint}"):
        if not (folder / name).is_file():
            raise PredictionInputError(
                f"{folder / name}: missing; {folder} is not a complete model folder. Has the job finished?"
            )
    try:
        return read_json(folder / "dataset.json")
    except JsonFileError as error:
        raise PredictionInputError(f"{error}. Restore the model folder.") from error


def check_images(images: Path, dataset_json: Mapping) -> dict[str, list[Path]]:
    """The channel files of each case of a folder, every one whole and on the grid of its case.

    Raises:
      DatasetError: If there are no images, or a case lacks a channel or has one too many; names the files.
      PredictionInputError: If an image cannot be read in full or does not fit the other channels of its case.
    """
    images = images.resolve()
    cases = list_cases(images.parent, dataset_json, images=images.name)
    for files in cases.values():
        _check_grid(files)
    return cases


def _check_grid(files: Sequence[Path]) -> None:
    """Raise `PredictionInputError` if a file is no image or the channels of a case differ in size or spacing."""
    first: tuple | None = None
    for file in files:
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(file))
        try:
            reader.ReadImageInformation()
            _check_whole(file)
        except (RuntimeError, EOFError, OSError, zlib.error) as error:
            raise PredictionInputError(
                f"{file}: not a readable image or not all of it. Restore or remove the file."
            ) from error
        grid = (reader.GetSize(), tuple(round(s, 4) for s in reader.GetSpacing()))
        first = first or grid
        if grid != first:
            raise PredictionInputError(
                f"{file}: size and spacing {grid} differ from {first} of {files[0].name}. "
                "All channels of a case must lie on one grid: resample them first."
            )


def _check_whole(file: Path) -> None:
    """Unpack to the end: ITK reads the missing part of a truncated .nii.gz as zeros, without a word."""
    if file.suffix == ".gz":
        with gzip.open(file) as stream:
            while stream.read(1 << 22):
                pass


def load_predictor(folder: Path, checkpoint: str, *, device: torch.device, mirroring: bool) -> nnUNetPredictor:
    """The stock predictor with the stock command's settings.

    Raises:
      PredictionInputError: If the model is a cascade.
    """
    chatter = io.StringIO()
    with contextlib.redirect_stdout(chatter):  # it prints whatever verbose says
        predictor = nnUNetPredictor(
            tile_step_size=0.5,
            use_gaussian=True,
            use_mirroring=mirroring,
            perform_everything_on_device=device.type
            == "cuda",  # as stock: only CUDA can, with a fallback if memory runs out
            device=device,
            verbose=False,
            verbose_preprocessing=False,
            allow_tqdm=False,
        )
        predictor.initialize_from_trained_model_folder(str(folder), use_folds=("all",), checkpoint_name=checkpoint)
    predictor.configuration_manager = with_own_schemes(predictor.configuration_manager)
    log.debug("nnU-Net: %s", chatter.getvalue().strip())
    if predictor.configuration_manager.previous_stage_name is not None:
        raise PredictionInputError(
            f"{folder}: a cascade model, which needs an earlier stage's label maps. Use nnUNetv2_predict."
        )
    return predictor


def read_cases(
    predictor: nnUNetPredictor, cases: Mapping[str, Sequence[Path]], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, np.ndarray, dict]]:
    """Each case's name, image (channel, z, y, x) and geometry; ``progress`` counts it when the next one is asked for.

    Raises:
      PredictionInputError: If an image's voxels are damaged.
    """
    reader = predictor.plans_manager.image_reader_writer_class()
    report = progress or (lambda done, total: None)
    report(0, len(cases))
    for done, (case, files) in enumerate(cases.items(), start=1):
        yield case, *_read(reader, case, files)
        log.debug("%s: %d of %d", case, done, len(cases))
        report(done, len(cases))


def _read(reader: BaseReaderWriter, case: str, files: Sequence[Path]) -> tuple[np.ndarray, dict]:
    """The case as (channel, z, y, x) and its geometry."""
    try:
        return reader.read_images([str(f) for f in files])
    except RuntimeError as error:  # the header was fine, so the voxels are damaged
        raise PredictionInputError(
            f"case {case}: cannot read {[f.name for f in files]} in {files[0].parent}: {error}"
        ) from error


def _write(reader: BaseReaderWriter, label_map: np.ndarray, path: Path, properties: dict) -> Path:
    """Write under a hidden name first: nobody sees half a file. The ending stays, as it selects the format."""
    temporary = path.with_name(f".partial.{path.name}")
    try:
        reader.write_seg(label_map, str(temporary), properties)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
