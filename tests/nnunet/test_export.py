import json
from pathlib import Path

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from fedcmt.nnunet.export import export_model_folder, model_folder, stock_network
from fedcmt.params import ParameterError
from tests.nnunet.tiny_classifier import CLASSES, classifier_parameters, export_tiny_classifier
from tests.nnunet.tiny_model import CONFIGURATION, DATASET_JSON, export_tiny, random_parameters, tiny_plans


def load(folder: Path, name: str = "checkpoint_final.pth") -> dict:
    return torch.load(folder / "fold_all" / name, weights_only=True)


def test_model_folder_is_where_nnunet_looks() -> None:
    expected = Path("r/Dataset901_Tiny/nnUNetTrainer__nnUNetPlans__3d_fullres")
    assert model_folder(Path("r"), tiny_plans(), CONFIGURATION) == expected


def test_checkpoint_is_what_the_stock_predictor_reads(tmp_path: Path) -> None:
    folder = export_tiny(tmp_path / "m", random_parameters(0), mirroring_axes=(0, 2))
    checkpoint = load(folder)
    weights = checkpoint.pop("network_weights")
    assert checkpoint == {
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": CONFIGURATION},
        "inference_allowed_mirroring_axes": (0, 2),
    }
    assert json.loads((folder / "plans.json").read_text()) == tiny_plans()
    assert json.loads((folder / "dataset.json").read_text()) == DATASET_JSON
    plans = PlansManager(tiny_plans())
    config = plans.get_configuration(CONFIGURATION)
    network = nnUNetTrainer.build_network_architecture(plans, config, 4, 3, enable_deep_supervision=False)
    network.load_state_dict(weights, strict=True)


def test_every_alias_holds_the_exported_tensor(tmp_path: Path) -> None:
    parameters = random_parameters(1)
    weights = load(export_tiny(tmp_path, parameters))["network_weights"]
    network = stock_network(tiny_plans(), DATASET_JSON, CONFIGURATION)
    names = {id(p): n for n, p in network.named_parameters()}
    aliases = {alias: names[id(p)] for alias, p in network.state_dict(keep_vars=True).items()}
    assert set(weights) == set(aliases)
    assert sum(name == "encoder.stages.0.0.convs.0.conv.weight" for name in aliases.values()) == 4
    for alias, name in aliases.items():
        assert torch.equal(weights[alias], parameters[name]), alias


def test_each_checkpoint_has_its_own_parameters(tmp_path: Path) -> None:
    final, best = random_parameters(1), random_parameters(2)
    export_model_folder(
        tmp_path,
        plans=tiny_plans(),
        dataset_json=DATASET_JSON,
        configuration=CONFIGURATION,
        mirroring_axes=(),
        checkpoints={"final": final, "best": best},
    )
    name = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(load(tmp_path)["network_weights"][name], final[name])
    assert torch.equal(load(tmp_path, "checkpoint_best.pth")["network_weights"][name], best[name])
    assert load(tmp_path)["inference_allowed_mirroring_axes"] is None
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("damage", ["missing", "unknown", "reshaped"])
def test_parameters_must_fit_and_nothing_is_written_otherwise(tmp_path: Path, damage: str) -> None:
    parameters = random_parameters(0)
    name = "decoder.seg_layers.0.bias"
    tensor = parameters.pop(name)
    if damage == "unknown":
        parameters |= {name: tensor, "head.bias": tensor}
    elif damage == "reshaped":
        parameters[name] = tensor[:1]
    with pytest.raises(ParameterError, match=r"'final'.*" + ("head.bias" if damage == "unknown" else name)):
        export_tiny(tmp_path / "m", parameters)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("checkpoints", [{}, {"last": {}}])
def test_checkpoint_names_are_final_and_best(tmp_path: Path, checkpoints: dict) -> None:
    with pytest.raises(ValueError, match="expected one or both"):
        export_model_folder(
            tmp_path,
            plans=tiny_plans(),
            dataset_json=DATASET_JSON,
            configuration=CONFIGURATION,
            mirroring_axes=None,
            checkpoints=checkpoints,
        )


def test_unknown_configuration_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'2d'.*3d_fullres"):
        stock_network(tiny_plans(), DATASET_JSON, "2d")


def test_exporting_leaves_random_state_and_plans_alone(tmp_path: Path) -> None:
    parameters = random_parameters(0)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    export_tiny(tmp_path, parameters)
    assert torch.equal(torch.rand(2), expected)


def test_aliases_do_not_make_the_file_larger(tmp_path: Path) -> None:
    parameters = {n: p.repeat(*[1] * p.ndim) for n, p in random_parameters(0).items()}
    folder = export_tiny(tmp_path, parameters)
    storages = {t.untyped_storage().data_ptr() for t in load(folder)["network_weights"].values()}
    assert len(storages) == len(parameters)


def test_stock_nnunet_builds_a_classifier_with_an_output_map_per_class(tmp_path: Path) -> None:
    parameters = classifier_parameters(3)
    folder = export_tiny_classifier(tmp_path, parameters)
    assert json.loads((folder / "classes.json").read_text()) == {"classes": list(CLASSES), "sharpness": 5.0}
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(folder), use_folds=("all",))
    loaded = dict(predictor.network.named_parameters())
    assert loaded.keys() == parameters.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in parameters.items())
    assert loaded["decoder.seg_layers.1.weight"].shape[0] == 4
    assert not predictor.label_manager.has_regions  # although the labels of the data set are
    assert predictor.dataset_json["channel_names"] == DATASET_JSON["channel_names"]


def test_a_segmentation_model_takes_a_classifier_s_place(tmp_path: Path) -> None:
    folder = export_tiny(export_tiny_classifier(tmp_path, classifier_parameters(3)), random_parameters(0))
    assert json.loads((folder / "dataset.json").read_text()) == DATASET_JSON
    assert not (folder / "classes.json").exists()
