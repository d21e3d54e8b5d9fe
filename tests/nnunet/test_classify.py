"""Class probabilities of whole images, and the files that hold them."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from fedcmt.data.checks import DatasetError
from fedcmt.data.classes import CaseClasses
from fedcmt.evaluation.classification import read_probabilities
from fedcmt.evaluation.metrics import EvaluationError
from fedcmt.nnunet.classify import classify_folder, model_classes, write_classification
from fedcmt.nnunet.predict import PredictionInputError, predict_folder
from tests.nnunet.tiny_classifier import CLASSES, classifier_parameters, constant_parameters, export_tiny_classifier
from tests.nnunet.tiny_model import export_tiny, random_parameters, write_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("raw") / "imagesTs")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny_classifier(tmp_path_factory.mktemp("model"), classifier_parameters(5))


def test_maps_of_one_value_give_the_softmax_of_their_values(images: Path, tmp_path: Path) -> None:
    logits = (0.0, math.log(2), math.log(4), 0.0)
    folder = export_tiny_classifier(tmp_path, constant_parameters(logits))
    found = classify_folder(folder, images, device=CPU, mirroring=False)
    assert list(found) == ["a_01", "b_02"]
    # 1 : 2 : 4 : 1; nnU-Net adds up windows in half precision.
    assert found["a_01"] == pytest.approx([1 / 8, 2 / 8, 4 / 8, 1 / 8], abs=1e-3)


def test_maps_are_pooled_with_the_sharpness_of_the_model_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_tiny_classifier(tmp_path, classifier_parameters(5))
    maps = torch.zeros(4, 1, 1, 2)
    maps[1, 0, 0, 1] = math.log(3)
    monkeypatch.setattr(nnUNetPredictor, "predict_logits_from_preprocessed_data", lambda self, data: maps)
    # r = 5: (1/5) ln((1 + 3^5) / 2) = (1/5) ln 122, so its weight is 122^(1/5); r = 1: (1 + 3) / 2 = 2.
    for sharpness, weight in ((5.0, 122**0.2), (1.0, 2.0)):
        (folder / "classes.json").write_text(json.dumps({"classes": CLASSES, "sharpness": sharpness}))
        found = classify_folder(folder, images, device=CPU)
        assert found["b_02"] == pytest.approx([1 / (3 + weight), weight / (3 + weight), *[1 / (3 + weight)] * 2])


def test_cases_differ_and_mirroring_can_be_switched_off(
    model: Path, images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    steps: list[tuple[int, int]] = []
    mirrored = classify_folder(model, images, device=CPU, progress=lambda *s: steps.append(s))
    plain = classify_folder(model, images, device=CPU, mirroring=False)
    assert steps == [(0, 2), (1, 2), (2, 2)]
    assert capfd.readouterr().out == ""
    assert mirrored["a_01"] != pytest.approx(mirrored["b_02"], abs=1e-4)
    assert mirrored["a_01"] != pytest.approx(plain["a_01"], abs=1e-4)
    assert all(sum(row) == pytest.approx(1, abs=1e-6) and min(row) > 0 for row in mirrored.values())


def test_each_kind_of_model_folder_is_refused_by_the_other_function(model: Path, images: Path, tmp_path: Path) -> None:
    segmentation = export_tiny(tmp_path / "model", random_parameters(11))
    with pytest.raises(PredictionInputError, match=r"classes\.json: missing; .*segmentation model"):
        classify_folder(segmentation, images, device=CPU)
    with pytest.raises(PredictionInputError, match="a classification model, which gives probabilities"):
        predict_folder(model, images, tmp_path / "out", device=CPU)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "said"), [("{torn", "not valid JSON"), ('{"classes": ["a"]}', "'sharpness'")])
def test_a_broken_classes_json_is_named(images: Path, tmp_path: Path, content: str, said: str) -> None:
    folder = export_tiny_classifier(tmp_path, classifier_parameters(5))
    (folder / "classes.json").write_text(content)
    with pytest.raises(PredictionInputError, match=rf"classes\.json: .*{said}.*Restore the model folder"):
        classify_folder(folder, images, device=CPU)


def test_faults_of_images_and_model_folder_are_named(model: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(PredictionInputError, match=r"checkpoint_best\.pth: missing"):
        classify_folder(model, images, device=CPU, checkpoint="checkpoint_best.pth")
    own = write_images(tmp_path / "i", ("a",))
    (own / "a_0003.nii.gz").write_bytes(b"no image")
    with pytest.raises(PredictionInputError, match=r"a_0003\.nii\.gz: not a readable image"):
        classify_folder(model, own, device=CPU)
    (own / "a_0003.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"a_0003\.nii\.gz is missing"):
        classify_folder(model, own, device=CPU)


def test_classes_are_in_the_order_of_the_probabilities(model: Path) -> None:
    assert model_classes(model) == CLASSES


def test_probabilities_and_scores_are_written(tmp_path: Path) -> None:
    names = ("none", "cyst")
    rows = {"a": [0.75, 0.25], "b": [0.5, 0.5], "c": [0.25, 0.75], "d": [0.125, 0.875]}
    truth = CaseClasses(names, {"a": 0, "b": 1, "c": 1, "d": -1, "e": 0})
    scores = write_classification(tmp_path / "new", rows, names, truth)
    assert scores is not None
    assert read_probabilities(tmp_path / "new" / "probabilities.csv") == (names, rows)
    with (tmp_path / "new" / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    # Of a, b and c, which are known, b counts as "none", the first of equals.
    confusion = {"none as none": "1", "none as cyst": "0", "cyst as none": "1", "cyst as cyst": "1"}
    means = {"cases": "3", "accuracy": str(2 / 3), "balanced_accuracy": "0.75", "auc": "1.0"}
    assert lines == [means | confusion]
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == scores.summary()
    assert {f.name for f in (tmp_path / "new").iterdir()} == {"probabilities.csv", "metrics.json", "metrics.csv"}


def test_without_classes_there_are_no_scores(tmp_path: Path) -> None:
    assert write_classification(tmp_path, {"a": [1.0, 0.0]}, ("x", "y"), None) is None
    assert [f.name for f in tmp_path.iterdir()] == ["probabilities.csv"]
    with pytest.raises(EvaluationError, match="no entry"):
        write_classification(tmp_path, {"a": [1.0, 0.0]}, ("x", "y"), CaseClasses(("x", "y"), {"b": 0}))
