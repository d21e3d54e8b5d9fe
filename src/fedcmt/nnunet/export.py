"""Model folders that stock nnU-Net loads, written from named tensors.

A checkpoint holds the whole state_dict of the stock network. In it nnU-Net names every encoder tensor four times, and a
strict load keeps whichever alias comes last; so parameters are copied into a network, by their one name, and the
aliases come from there. A network of `fedcmt.models` is named in the plans: to load its folder, nnU-Net must be able to
import this package.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from fedcmt.json_file import write_json
from fedcmt.models.pooling import SHARPNESS
from fedcmt.nnunet.network import build_network
from fedcmt.params import ParameterError, check_names, copy_into

_CHECKPOINTS = {"final": "checkpoint_final.pth", "best": "checkpoint_best.pth"}

CLASSES_FILE = "classes.json"
"""In a classifier's model folder only: ``{"classes": [name, ...], "sharpness": of the pooling}``."""


def model_folder(results: Path, plans: Mapping, configuration: str, trainer_name: str = "nnUNetTrainer") -> Path:
    """Where nnU-Net looks for a model: ``<results>/<dataset>/<trainer>__<plans>__<configuration>``."""
    return results / plans["dataset_name"] / f"{trainer_name}__{plans['plans_name']}__{configuration}"


def stock_network(plans: Mapping, dataset_json: Mapping, configuration: str) -> nn.Module:
    """The network nnU-Net builds from these plans to train it; torch's random state is left alone.

    Raises:
      ValueError: If the plans lack the configuration.
    """
    if configuration not in plans["configurations"]:
        raise ValueError(
            f"plans {plans['plans_name']}: no configuration {configuration!r}, only {list(plans['configurations'])}."
        )
    num_inputs = determine_num_input_channels(PlansManager(dict(plans)), configuration, dict(dataset_json))
    with torch.random.fork_rng(devices=[]):  # exporting in the middle of a job must not change its next steps
        return build_network(plans, configuration, num_inputs, dataset_json)


def classifier_dataset_json(dataset_json: Mapping, classes: Sequence[str]) -> dict:
    """A dataset.json for which nnU-Net builds one output map per class.

    Args:
      dataset_json: The site's, whose labels or regions give way to the classes.
      classes: Class names in the order of their indices.
    """
    kept = {key: value for key, value in dataset_json.items() if key not in ("labels", "regions_class_order")}
    # nnU-Net wants a background, at 0, and makes one output per value: the first class shares that one. The prefix
    # keeps classes from being called what nnU-Net gives a meaning, background and ignore.
    named = {f"class {name}": index for index, name in enumerate(classes)}
    return {**kept, "labels": {"background": 0, **named}}


def export_model_folder(
    folder: Path,
    *,
    plans: Mapping,
    dataset_json: Mapping,
    configuration: str,
    mirroring_axes: tuple[int, ...] | None,
    checkpoints: Mapping[str, Mapping[str, Tensor]],
    fold: str | int = "all",
    trainer_name: str = "nnUNetTrainer",
    classes: Sequence[str] | None = None,
) -> Path:
    """Write a model folder for ``nnUNetv2_predict_from_modelfolder -f <fold>``.

    Each file is replaced atomically, and nothing is written unless all parameters fit. The checkpoints hold only
    tensors and plain values: ``torch.load(weights_only=True)`` reads them. Stock nnU-Net loads a classifier's folder
    too, but does not pool: use `classify_folder`.

    Args:
      folder: Becomes the model folder; `model_folder` gives nnU-Net's own place for it.
      plans: The plans the site trained with.
      dataset_json: The site's dataset.json.
      configuration: Such as ``3d_fullres``.
      mirroring_axes: Spatial axes that test-time mirroring may flip; None or empty for none.
      checkpoints: ``"final"`` and/or ``"best"`` -> every parameter by its name in ``named_parameters()``.
      fold: Suffix of the fold folder.
      trainer_name: Trainer that stock nnU-Net looks up to build the network.
      classes: A classifier's class names in the order of its output maps; None for a segmentation model.

    Returns:
      ``folder``.

    Raises:
      ParameterError: If parameters are missing, unknown or of another shape.
      ValueError: If the configuration or a checkpoint name is unknown, or there is no checkpoint.
    """
    unknown = sorted(set(checkpoints) - set(_CHECKPOINTS))
    if unknown or not checkpoints:
        raise ValueError(
            f"{folder}: checkpoints {sorted(checkpoints)} to export; expected one or both of {list(_CHECKPOINTS)}."
        )
    if classes is not None:
        dataset_json = classifier_dataset_json(dataset_json, classes)
    common = {
        "trainer_name": trainer_name,
        "init_args": {"configuration": configuration},
        # nnU-Net takes the maximum of the axes and fails on an empty tuple
        "inference_allowed_mirroring_axes": tuple(int(axis) for axis in mirroring_axes) if mirroring_axes else None,
    }
    contents = {}
    for kind, parameters in checkpoints.items():
        network = stock_network(plans, dataset_json, configuration)
        _load_all(network, parameters, where=f"{folder}: checkpoint {kind!r}")
        weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
        contents[kind] = {"network_weights": weights, **common}
    _write_folder(folder, f"fold_{fold}", plans, dataset_json, classes, contents)
    return folder


def _write_folder(
    folder: Path,
    fold: str,
    plans: Mapping,
    dataset_json: Mapping,
    classes: Sequence[str] | None,
    contents: Mapping[str, Mapping],
) -> None:
    fold_folder = folder / fold
    fold_folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "plans.json", plans, indent=4)
    write_json(folder / "dataset.json", dataset_json, indent=4)
    if classes is None:
        (folder / CLASSES_FILE).unlink(missing_ok=True)
    else:
        write_json(folder / CLASSES_FILE, {"classes": list(classes), "sharpness": SHARPNESS})
    for kind, content in contents.items():
        _write_checkpoint(fold_folder / _CHECKPOINTS[kind], content)


def _load_all(network: nn.Module, parameters: Mapping[str, Tensor], *, where: str) -> None:
    """Copy in a complete set of parameters: unlike `copy_into` alone, one that is missing is an error."""
    buffers = [name for name, _ in network.named_buffers()]
    if buffers:
        raise ParameterError(
            f"{where}: {type(network).__name__} has buffers {buffers[:4]}, which parameters do not restore."
        )
    check_names(parameters, [name for name, _ in network.named_parameters()], where=where)
    copy_into(network, parameters, where=where)


def _write_checkpoint(path: Path, content: Mapping) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    torch.save(content, temporary)
    temporary.replace(path)
