"""Label maps of a folder of images from an exported model, in this process, equal to those of stock nnU-Net."""

import contextlib
import gzip
import io
import logging
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import nn

from fedcmt.data.checks import DatasetError, channel_names, list_cases, raise_if, read_dataset_json
from fedcmt.evaluation.subsets import Subset, chosen_sequences, sequences_of
from fedcmt.json_file import JsonFileError, read_json
from fedcmt.models.fedmepd import FedMEPDNet
from fedcmt.models.munet import MUNet
from fedcmt.nnunet.export import CLASSES_FILE
from fedcmt.nnunet.normalization import with_own_schemes

log = logging.getLogger(__name__)

_LOAD_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, OSError, RuntimeError),
    *(TypeError, ValueError, UnpicklingError),
)
"""What nnU-Net and torch raise for plans, labels or a checkpoint that are damaged."""


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
    sequences: Sequence[str] | None = None,
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
      sequences: Go by these channels alone, under any name that `fedcmt.models.sequences` knows; files of the others
        are not opened and may be absent. In their place nnU-Net's preprocessing gets zeros, so crop and normalisation
        are those of a site without them. For `FedMEPDNet`, whose other encoders do not run, and `MUNet`. None for all.

    Returns:
      The label maps, by case name: each with the size, spacing, origin and direction of its input.

    Raises:
      DatasetError: If there are no images, or a case lacks a channel or has one too many; names the files.
      SubsetError: If ``sequences`` are not some of the model's.
      PredictionInputError: If the model folder lacks a file or its dataset.json is broken, the model is a classifier or
        a cascade, or an image cannot be read in full or does not fit the other channels of its case; with
        ``sequences``, if the network needs every channel or a case is zero everywhere in those.
      OSError: If ``output`` cannot be written.
    """
    dataset_json = check_model(model_folder, checkpoint)
    if (model_folder / CLASSES_FILE).is_file():
        raise PredictionInputError(
            f"{model_folder}: a classification model, which gives probabilities and no label maps. Use classify_folder."
        )
    subset = None if sequences is None else chosen_sequences(dataset_json, sequences)
    cases = check_images(images, dataset_json, subset)
    predictor = load_predictor(model_folder, checkpoint, device=device, mirroring=mirroring)
    writer = predictor.plans_manager.image_reader_writer_class()
    written = []
    with _going_by(predictor.network, subset, model_folder):
        output.mkdir(parents=True, exist_ok=True)
        for case, image, properties in read_cases(predictor, cases, progress):
            if subset is not None:
                image = _with_zeros(case, image, dataset_json, subset)
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
        read_json(folder / "plans.json")
        return read_dataset_json(folder)
    except (DatasetError, JsonFileError) as error:
        raise PredictionInputError(f"{error}. Restore the model folder.") from error


def check_images(images: Path, dataset_json: Mapping, subset: Subset | None = None) -> dict[str, list[Path]]:
    """The files that `list_images` lists, every one whole and on the grid of its case.

    Raises:
      DatasetError: As in `list_images`.
      PredictionInputError: If an image cannot be read in full or does not fit the other channels of its case.
    """
    cases = list_images(images, dataset_json, subset)
    for files in cases.values():
        _check_grid(files)
    return cases


def list_images(images: Path, dataset_json: Mapping, subset: Subset | None = None) -> dict[str, list[Path]]:
    """The channel files of each case of a folder, in channel order, sorted by case.

    Args:
      images: Folder of images.
      dataset_json: The model's.
      subset: List the files of these sequences alone, whatever there is of the others; None for all channels.

    Raises:
      DatasetError: If there are no images, or a case lacks a channel; without ``subset`` also if it has one too many.
    """
    folder = images.resolve()
    if subset is None:
        return list_cases(folder.parent, dataset_json, images=folder.name)
    ending = str(dataset_json["file_ending"])
    numbered = re.compile(rf"(.+)_\d{{4}}{re.escape(ending)}")
    names = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    cases = sorted({match[1] for match in map(numbered.fullmatch, names) if match})
    channels = {i: f"{i:04d}{ending}" for i in _channels(dataset_json, subset)}
    problems = [
        f"{folder.name}/{case}_{tail} is missing (channel {i}, {channel_names(dataset_json)[i]!r}). Every case needs "
        "the channels that are predicted from: add the file, remove the case or name other channels."
        for case in cases
        for i, tail in channels.items()
        if f"{case}_{tail}" not in names
    ]
    if not cases:
        problems = [f"{folder.name} holds no images. Put the images there, named CASE_0000{ending}."]
    raise_if(folder, problems)
    return {case: [folder / f"{case}_{tail}" for tail in channels.values()] for case in cases}


def _channels(dataset_json: Mapping, subset: Subset) -> list[int]:
    """Numbers of the channels that are in the subset."""
    return [number for number, sequence in enumerate(sequences_of(dataset_json)) if sequence in subset]


def _with_zeros(case: str, image: np.ndarray, dataset_json: Mapping, subset: Subset) -> np.ndarray:
    """All channels of a model (channel, z, y, x), of which those outside of the subset are zero."""
    if not image.any():
        raise PredictionInputError(
            f"case {case}: zero everywhere in {', '.join(subset)}, so there is nothing to predict from. Remove the "
            "case or name other channels."
        )
    channels = _channels(dataset_json, subset)
    whole = np.zeros((len(channel_names(dataset_json)), *image.shape[1:]), image.dtype)
    whole[channels] = image
    return whole


@contextlib.contextmanager
def _going_by(network: nn.Module, subset: Subset | None, folder: Path) -> Iterator[None]:
    """Let a network take the sequences outside of the subset for missing while in here; None changes nothing.

    Args:
      network: The model's.
      subset: Sequences that it has.
      folder: The model folder, for the message.

    Raises:
      PredictionInputError: If it needs every channel.
    """
    if isinstance(network, FedMEPDNet) and subset is not None:
        with network.only(subset):
            yield
    elif subset is None or isinstance(network, MUNet):  # to which a channel of zeros is a sequence that is missing
        yield
    else:
        raise PredictionInputError(
            f"{folder}: a {type(network).__name__}, which needs every channel, not {', '.join(subset)} alone. Only "
            "FedMEPDNet and MUNet can do without some; predict from all channels."
        )


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
      PredictionInputError: If the model is a cascade, or its files are damaged or do not fit each other.
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
        _refuse_code(folder / "fold_all" / checkpoint)
        try:
            predictor.initialize_from_trained_model_folder(str(folder), use_folds=("all",), checkpoint_name=checkpoint)
        except _LOAD_ERRORS as error:
            raise PredictionInputError(
                f"{folder}: nnU-Net cannot build the network of plans.json and dataset.json with the weights of "
                f"fold_all/{checkpoint} ({type(error).__name__}: {error}). Restore the model folder."
            ) from error
    predictor.configuration_manager = with_own_schemes(predictor.configuration_manager)
    log.debug("nnU-Net: %s", chatter.getvalue().strip())
    if predictor.configuration_manager.previous_stage_name is not None:
        raise PredictionInputError(
            f"{folder}: a cascade model, which needs an earlier stage's label maps. Use nnUNetv2_predict."
        )
    return predictor


def _refuse_code(checkpoint: Path) -> None:
    """nnU-Net unpickles whatever a checkpoint holds, and what is code in it would run: look first without.

    Raises:
      PredictionInputError: If it cannot be read as tensors and plain values.
    """
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        raise PredictionInputError(
            f"{checkpoint}: cannot be read as tensors and plain values alone ({type(error).__name__}). It is damaged, "
            "or holds code, which loading it would run; what a run exports does not. Restore the model folder."
        ) from error


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
