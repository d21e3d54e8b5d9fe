"""Min-max inside the foreground mask: its values, and its way through nnU-Net's preprocessing and prediction."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from fedcmt.json_file import read_json
from fedcmt.nnunet.export import export_model_folder, stock_network
from fedcmt.nnunet.fingerprint import bin_policy
from fedcmt.nnunet.normalization import MaskedMinMaxNormalization, with_own_schemes
from fedcmt.nnunet.planning_options import PlanningOptions
from fedcmt.nnunet.plans import plan_federation
from fedcmt.nnunet.site_data import own_fingerprint, prepare_data
from fedcmt.params import snapshot
from tests.nnunet.tiny_data import geometries, write_dataset

CONFIGURATION = "2d"


def normalised(values: list[float], inside: list[bool]) -> np.ndarray:
    image = np.array(values, dtype=np.float32)[None, None]
    seg = np.where(inside, 0, -1)[None, None]
    return MaskedMinMaxNormalization(use_mask_for_norm=True, intensityproperties={}).run(image, seg)[0, 0]


def test_t14_the_smallest_value_of_the_mask_becomes_0_and_the_largest_1() -> None:
    values = [0.0, 10, 20, 30, 110]
    np.testing.assert_allclose(normalised(values, [v != 0 for v in values]), [0, 0, 0.1, 0.2, 1], atol=1e-7)


def test_values_outside_of_the_mask_do_not_count_and_become_0() -> None:
    result = normalised([-50, 10, 60, 999], [False, True, True, False])
    np.testing.assert_array_equal(result, [0, 0, 1, 0])
    assert result.dtype == np.float32


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_constant_channel_becomes_0(value: float) -> None:
    np.testing.assert_array_equal(normalised([value] * 3, [True, True, False]), 0)


def test_an_empty_mask_gives_0() -> None:
    np.testing.assert_array_equal(normalised([1.0, 2.0], [False, False]), 0)


def test_the_mask_is_asked_for() -> None:
    with pytest.raises(ValueError, match="MaskedMinMaxNormalization: needs nnU-Net's segmentation"):
        MaskedMinMaxNormalization(use_mask_for_norm=True, intensityproperties={}).run(np.zeros((1, 2, 2)))


class Site:
    """A data set of two channels, prepared with min-max, and its untrained model."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.dataset = write_dataset(
            root / "raw" / "Dataset001_Two", geometries(3, (9, 18, 20), (1.0, 1.0, 1.0)), channels=("T1", "FLAIR")
        )
        self.dataset_json = read_json(self.dataset / "dataset.json")
        options = PlanningOptions(
            configuration=CONFIGURATION, network="MUNet", normalization="minmax", base_features=2, max_stages=2,
            min_cases=1,
        )  # fmt: skip
        fingerprint = own_fingerprint(self.dataset, options)
        planned = plan_federation({"s": fingerprint.coarsened(bin_policy("consensus"))}, options)["s"]
        self.plans = prepare_data(planned, fingerprint, self.dataset, root / "pre", options, site="s", job="j")

    def configuration(self, plans: dict[str, Any] | None = None) -> ConfigurationManager:
        return PlansManager(plans or self.plans).get_configuration(CONFIGURATION)

    def predictor(self) -> nnUNetPredictor:
        network = stock_network(self.plans, self.dataset_json, CONFIGURATION)
        model = export_model_folder(
            self.root / "model",
            plans=self.plans,
            dataset_json=self.dataset_json,
            configuration=CONFIGURATION,
            mirroring_axes=None,
            checkpoints={"final": snapshot(network)},
        )
        predictor = nnUNetPredictor(perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), use_folds=("all",))
        return predictor


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


def test_preprocessed_cases_span_0_to_1_and_are_0_outside(site: Site) -> None:
    folder = site.root / "pre" / site.dataset.name / site.configuration().data_identifier
    dataset = infer_dataset_class(str(folder))(str(folder))
    for case in dataset.identifiers:
        data, seg, _, _ = dataset.load_case(case)
        data, outside = data[:], seg[:][0] < 0
        # Resampling comes after it, and may round.
        np.testing.assert_allclose(data.min(axis=(1, 2, 3)), 0, atol=0.05)
        np.testing.assert_allclose(data.max(axis=(1, 2, 3)), 1, atol=0.05)
        assert not data[:, outside].any()


def test_nnunet_s_predictor_preprocesses_as_for_training_once_it_knows_the_scheme(site: Site) -> None:
    predictor = site.predictor()
    predictor.configuration_manager = with_own_schemes(predictor.configuration_manager)
    images = [str(site.dataset / "imagesTr" / f"case000_000{channel}.nii.gz") for channel in (0, 1)]
    image, properties = predictor.plans_manager.image_reader_writer_class().read_images(images)
    label_map = predictor.predict_single_npy_array(image, properties, None, None, False)
    assert label_map.shape == image.shape[1:]
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    data, _, _ = preprocessor.run_case(
        images, None, predictor.plans_manager, predictor.configuration_manager, site.dataset_json
    )
    folder = site.root / "pre" / site.dataset.name / site.configuration().data_identifier
    np.testing.assert_array_equal(data, infer_dataset_class(str(folder))(str(folder)).load_case("case000")[0][:])


def test_stock_preprocessing_says_that_it_lacks_the_scheme(site: Site) -> None:
    images = [str(site.dataset / "imagesTr" / f"case000_000{channel}.nii.gz") for channel in (0, 1)]
    with pytest.raises(RuntimeError, match="Unable to locate class 'MaskedMinMaxNormalization' for normalization"):
        DefaultPreprocessor(verbose=False).run_case(
            images, None, PlansManager(site.plans), site.configuration(), site.dataset_json
        )


def test_nnunet_s_own_schemes_stay_with_nnunet(site: Site) -> None:
    def with_schemes(*schemes: str) -> ConfigurationManager:
        return ConfigurationManager({**site.configuration().configuration, "normalization_schemes": list(schemes)})

    stock = with_schemes("ZScoreNormalization", "CTNormalization")
    assert with_own_schemes(stock) is stock
    with pytest.raises(ValueError, match=r"\['MaskedMinMaxNormalization'\] must be that of every channel or of none"):
        with_own_schemes(with_schemes("MaskedMinMaxNormalization", "CTNormalization"))
