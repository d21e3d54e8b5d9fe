import csv
import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import Inference
from fedcmt.evaluation.classification import read_probabilities
from tests.nnunet.tiny_classifier import CLASSES, constant_parameters, export_tiny_classifier
from tests.nnunet.tiny_model import DATASET_JSON, as_image, export_tiny, random_parameters, write_images
from tests.nnunet.tiny_sequences import export_sequences, sequence_parameters

DATASETS = {"client1": "Dataset901_Tiny", "client2": "Dataset902_Tiny"}


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Two segmentation sites, of which the first has labels."""
    sites: dict[str, dict] = {}
    for client, dataset in DATASETS.items():
        model = f"sites/{client}/nnUNetTrainer__nnUNetPlans__3d_fullres"
        export_tiny(tmp_path / model, random_parameters(11), mirroring_axes=None)
        write_images(tmp_path / "nnUNet_raw" / dataset / "imagesTs", ("a_01",))
        sites[client] = {"task": "segmentation", "dataset": dataset, "model_folder": model}
    labels = tmp_path / "nnUNet_raw" / DATASETS["client1"] / "labelsTs"
    labels.mkdir()
    sitk.WriteImage(as_image(np.full((13, 22, 19), 3, np.uint8)), str(labels / "a_01.nii.gz"))
    (tmp_path / "results.json").write_text(json.dumps({"job": "tiny", "sites": sites}))
    return tmp_path


@pytest.fixture
def classifier(workspace: Path) -> Path:
    """The data set of a classification site in place of client2; its model holds "cyst", class 2, most probable."""
    model = "sites/client2/nnUNetTrainer__nnUNetPlans__3d_fullres"
    export_tiny_classifier(workspace / model, constant_parameters((0.0, 0.0, 1.0, 0.0)))
    dataset = write_dataset(workspace / "nnUNet_raw" / DATASETS["client2"], ("b_02",))
    results = json.loads((workspace / "results.json").read_text())
    results["sites"]["client2"] |= {"task": "classification", "classes": "classes.json"}
    (workspace / "results.json").write_text(json.dumps(results))
    return dataset


def write_dataset(folder: Path, test: tuple[str, ...]) -> Path:
    """A data set with a training case of each class and, besides a_01 and these test cases, the classes of all."""
    training = {f"t_{index}": index for index in range(4)}
    write_images(folder / "imagesTr", tuple(training))
    write_images(folder / "imagesTs", ("a_01", *test))
    (folder / "labelsTr").mkdir()
    for case in training:
        sitk.WriteImage(as_image(np.full((13, 22, 19), 3, np.uint8)), str(folder / "labelsTr" / f"{case}.nii.gz"))
    (folder / "dataset.json").write_text(json.dumps({**DATASET_JSON, "numTraining": 4}))
    cases = {"a_01": 2, **training, **dict.fromkeys(test, 0)}
    (folder / "classes.json").write_text(json.dumps({"classes": CLASSES, "cases": cases}))
    return folder


@pytest.fixture
def fedmepd(workspace: Path) -> Path:
    """The workspace with FedMEPDNet at both sites, and label maps at both."""
    for client, dataset in DATASETS.items():
        model = workspace / "sites" / client / "nnUNetTrainer__nnUNetPlans__3d_fullres"
        export_sequences(model, "FedMEPDNet", sequence_parameters("FedMEPDNet"))
        labels = workspace / "nnUNet_raw" / dataset / "labelsTs"
        labels.mkdir(exist_ok=True)
        sitk.WriteImage(as_image(np.full((13, 22, 19), 1, np.uint8)), str(labels / "a_01.nii.gz"))
    return workspace


def output_of(workspace: Path, client: str) -> Path:
    return workspace / "sites" / client / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "predictions" / "imagesTs"


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a wrong command and return its one line."""
    assert Inference.main([str(a) for a in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize("name", ["client1", "app_client1"])
def test_one_client_is_segmented_and_scored(workspace: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert Inference.main(["--workspace", str(workspace), "--clients", name, "--gpu_ids", "0"]) == 0
    folder = output_of(workspace, "client1")
    assert {f.name for f in folder.iterdir()} == {"a_01.nii.gz", "metrics.json", "metrics.csv"}
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "a_01.nii.gz")))
    share = np.mean(found == 3)
    scores = json.loads((folder / "metrics.json").read_text())
    assert scores["dice"]["ET"] == pytest.approx(2 * share / (1 + share))
    out = capsys.readouterr().out
    assert out.startswith("no CUDA device: running on the CPU\n")
    assert "client1: 1 of 1 cases segmented" in out
    assert f"{scores['dice']['ET']:.4f}" in out.split("\n\n")[-2].splitlines()[-1]


def test_results_are_replaced(workspace: Path) -> None:
    folder = output_of(workspace, "client1")
    folder.mkdir(parents=True)
    (folder / "a_01.nii.gz").write_bytes(b"old")
    assert Inference.main(["--workspace", str(workspace), "--clients", "client1"]) == 0
    assert sitk.ReadImage(str(folder / "a_01.nii.gz")).GetSize() == (19, 22, 13)


def test_any_folder_with_labels_elsewhere(workspace: Path, tmp_path: Path) -> None:
    labels = workspace / "nnUNet_raw" / DATASETS["client1"] / "labelsTs"
    images = write_images(tmp_path / "mine", ("a_01", "new"))
    arguments = ["--workspace", workspace, "--clients", "client2", "--input", images, "--output", tmp_path / "o"]
    assert Inference.main([str(a) for a in [*arguments, "--disable_tta"]]) == 0
    assert {f.name for f in (tmp_path / "o").iterdir()} == {"a_01.nii.gz", "new.nii.gz"}
    assert Inference.main([str(a) for a in [*arguments, "--labels", labels]]) == 0
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["cases"] == 1


def test_references_without_images_are_named_before_predicting(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = workspace / "nnUNet_raw" / DATASETS["client1"] / "labelsTs"
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "b.nii.gz").write_bytes(b"an older prediction")
    for case in ("b", "c"):
        (labels / f"{case}.nii.gz").touch()
    message = fails(capsys, "--workspace", workspace, "--clients", "client1", "--output", tmp_path / "o")
    assert "labelsTs: 2 of 3 references have no images: b, c" in message
    assert [f.name for f in (tmp_path / "o").iterdir()] == ["b.nii.gz"]


def test_a_classification_client_gets_probabilities_and_scores(
    workspace: Path, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Inference.main(["--workspace", str(workspace), "--clients", "client2"]) == 0
    folder = output_of(workspace, "client2")
    assert {f.name for f in folder.iterdir()} == {"probabilities.csv", "metrics.json", "metrics.csv"}
    names, probabilities = read_probabilities(folder / "probabilities.csv")
    assert names == CLASSES
    assert probabilities["b_02"] == pytest.approx([1 / (3 + np.e)] * 2 + [np.e / (3 + np.e), 1 / (3 + np.e)], abs=1e-3)
    # a_01 is a cyst, b_02 a tumour that is taken for one; the probabilities are equal, so nothing ranks right.
    scores = json.loads((folder / "metrics.json").read_text())
    expected = {"cases": 2, "accuracy": 0.5, "balanced_accuracy": 0.5, "auc": 0.5, "classes": list(CLASSES)}
    assert {k: v for k, v in scores.items() if k != "confusion"} == expected
    assert [row[2] for row in scores["confusion"]] == [1, 0, 1, 0]
    with (folder / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["accuracy"], row["tumour as cyst"], row["tumour as tumour"]) == ("0.5", "1", "0")
    out = capsys.readouterr().out
    assert "client2: 2 of 2 cases classified" in out
    assert out.splitlines()[-2].split() == ["site", "cases", "accuracy", "balanced", "accuracy", "AUC"]
    assert out.splitlines()[-1].split() == ["client2", "2", "0.5000", "0.5000", "0.5000"]


def test_unknown_classes_give_probabilities_alone_and_old_scores_go(
    workspace: Path, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((classifier / "classes.json").read_text())
    content["cases"] |= {"a_01": None, "b_02": None}
    (classifier / "classes.json").write_text(json.dumps(content))
    folder = output_of(workspace, "client2")
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    assert Inference.main(["--workspace", str(workspace), "--clients", "client2"]) == 0
    assert [f.name for f in folder.iterdir()] == ["probabilities.csv"]
    assert "accuracy" not in capsys.readouterr().out


def test_classes_of_a_client_come_from_another_data_set_folder(
    workspace: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_dataset(tmp_path / "other", ("n_1", "n_2"))
    here = ("--workspace", workspace, "--clients", "client2", "--input", other / "imagesTs", "--output", tmp_path / "o")
    assert Inference.main([str(a) for a in here]) == 0
    assert [f.name for f in (tmp_path / "o").iterdir()] == ["probabilities.csv"]
    assert Inference.main([str(a) for a in (*here, "--labels", other)]) == 0
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["accuracy"] == pytest.approx(1 / 3)
    (tmp_path / "o" / "probabilities.csv").unlink()
    assert "3 cases: n_1, n_2." in fails(capsys, *here, "--labels", classifier)
    content = json.loads((other / "classes.json").read_text()) | {"classes": [*CLASSES[:3], "else"]}
    (other / "classes.json").write_text(json.dumps(content))
    assert "'else'], the model ['tumour'" in fails(capsys, *here, "--labels", other)
    assert "neither classes.json nor classes.csv" in fails(capsys, *here, "--labels", other / "imagesTs")
    assert not (tmp_path / "o" / "probabilities.csv").exists()


def test_a_task_that_does_not_fit_the_model_is_named(
    workspace: Path, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (workspace / "results.json").read_text()
    here = ("--workspace", workspace, "--clients", "client2")
    (workspace / "results.json").write_text(text.replace('"classification"', '"segmentation"'))
    assert "a classification model" in fails(capsys, *here)
    (workspace / "results.json").write_text(text.replace('"classification"', '"registration"'))
    assert "'registration' model; expected segmentation or classification" in fails(capsys, *here)


def test_both_tasks_run_side_by_side(workspace: Path, classifier: Path) -> None:
    done = run_all(workspace)
    assert done.returncode == 0, done.stderr
    assert (output_of(workspace, "client1") / "a_01.nii.gz").is_file()
    assert (output_of(workspace, "client2") / "probabilities.csv").is_file()
    tables = done.stdout.split("\n\n")
    assert [table.splitlines()[-1].split()[0] for table in tables[-2:]] == ["client1", "client2"]


def test_some_channels_have_a_folder_of_their_own_and_need_no_other_files(
    fedmepd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["--workspace", str(fedmepd), "--clients", "client1", "--channels", "t2w, FLAIR"]
    assert Inference.main(here) == 0
    folder = output_of(fedmepd, "client1").with_name("imagesTs-FLAIR+T2")
    assert {f.name for f in folder.iterdir()} == {"a_01.nii.gz", "metrics.json", "metrics.csv"}
    assert not output_of(fedmepd, "client1").exists()
    scores = json.loads((folder / "metrics.json").read_text())
    assert f"client1      1  {scores['dice']['oedema']:.4f}  " in capsys.readouterr().out
    images = fedmepd / "nnUNet_raw" / DATASETS["client1"] / "imagesTs"
    (images / "a_01_0000.nii.gz").unlink()
    (images / "a_01_0001.nii.gz").write_bytes(b"garbage")
    assert Inference.main([*here, "--input", str(images), "--output", str(tmp_path / "o")]) == 0
    found, expected = (sitk.ReadImage(str(f / "a_01.nii.gz")) for f in (tmp_path / "o", folder))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(expected))


def test_every_subset_is_scored_and_shown_as_one_table(fedmepd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Inference.main(["--workspace", str(fedmepd), "--clients", "client1", "--every_subset"]) == 0
    predictions = output_of(fedmepd, "client1").parent
    folders = {path.name for path in predictions.iterdir() if path.is_dir()}
    assert len(folders) == 15
    assert {"imagesTs-T1", "imagesTs-FLAIR+T1ce+T1+T2"} < folders
    with (predictions / "subsets.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    marks = {name: rows[6][name] for name in ("FLAIR", "T1ce", "T1", "T2")}
    assert marks == {"FLAIR": "1", "T1ce": "0", "T1": "0", "T2": "1"}
    scores = json.loads((predictions / "imagesTs-FLAIR+T2" / "metrics.json").read_text())
    values = [float(rows[6][name]) for name in ("oedema", "core", "mean_dice")]
    assert values == [scores["dice"]["oedema"], scores["dice"]["core"], scores["mean_dice"]]
    assert len({row["oedema"] for row in rows}) > 10
    out = capsys.readouterr().out
    assert "client1: 0 of 15 cases segmented" in out
    assert out.count(" of 15 cases segmented") == 16
    assert out.endswith(f"\nclient1: {(predictions / 'subsets.md').read_text()}")


def test_regions_of_the_job_are_scored_instead_of_labels(fedmepd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_score_regions(fedmepd, {"tumour": [1, 2], "core": [2]})
    assert Inference.main(["--workspace", str(fedmepd), "--clients", "client1"]) == 0
    folder = output_of(fedmepd, "client1")
    scores = json.loads((folder / "metrics.json").read_text())
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "a_01.nii.gz")))
    share = np.mean(found > 0)  # the reference is 1 everywhere
    assert 0 < share < 1
    assert scores["dice"] == pytest.approx({"tumour": 2 * share / (1 + share), "core": 0})
    assert scores["mean_dice"] == pytest.approx(share / (1 + share))
    head, row = capsys.readouterr().out.split("\n\n")[1].splitlines()[:2]
    assert head.split()[-4:] == ["tumour", "core", "mean", "Dice"]
    assert row.split()[:3] == ["client1", "1", f"{scores['dice']['tumour']:.4f}"]


def test_regions_of_the_job_are_the_columns_of_the_subsets(fedmepd: Path) -> None:
    use_one_sequence(fedmepd, "client1")
    set_score_regions(fedmepd, {"tumour": [1, 2]})
    assert Inference.main(["--workspace", str(fedmepd), "--clients", "client1", "--every_subset"]) == 0
    predictions = output_of(fedmepd, "client1").parent
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(predictions / "imagesTs-FLAIR" / "a_01.nii.gz")))
    share = np.mean(found > 0)
    with (predictions / "subsets.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert list(row) == ["FLAIR", "tumour", "mean_dice"]
    assert float(row["tumour"]) == float(row["mean_dice"]) == pytest.approx(2 * share / (1 + share))


@pytest.mark.parametrize(
    ("regions", "expected"),
    [
        ({"tumour": [0]}, "client client1: score_regions in "),
        (["tumour"], "client client1: score_regions in "),
        ({"tumour": [1, 7]}, "dataset.json has no label of [7]; its label ids are [1, 2]"),
    ],
)
@pytest.mark.parametrize("option", [[], ["--every_subset"]])
def test_regions_that_do_not_fit_are_told_before_anything_is_predicted(
    fedmepd: Path, capsys: pytest.CaptureFixture[str], option: list[str], regions: object, expected: str
) -> None:
    set_score_regions(fedmepd, regions)
    assert expected in fails(capsys, "--workspace", fedmepd, "--clients", "client1", *option)
    assert not list(fedmepd.rglob("predictions/**/*.nii.gz"))


def set_score_regions(workspace: Path, regions: object) -> None:
    """As a job leaves them in results.json."""
    results = json.loads((workspace / "results.json").read_text())
    for site in results["sites"].values():
        site["score_regions"] = regions
    (workspace / "results.json").write_text(json.dumps(results))


def test_every_subset_and_some_channels_reach_the_child_processes(
    fedmepd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The children run one after the other in this process, each with its own command line."""
    ran: list[list[str]] = []

    def in_turn(works: list[Inference.Work], args: Namespace, gpus: list[int]) -> list[str]:
        ran.extend(Inference.child_command(work.client, args)[2:] for work in works)
        return [work.client for work, command in zip(works, ran, strict=True) if Inference.main(command)]

    monkeypatch.setattr(Inference, "run_side_by_side", in_turn)
    for client in DATASETS:
        use_one_sequence(fedmepd, client)
    assert Inference.main(["--workspace", str(fedmepd), "--every_subset"]) == 0
    out = capsys.readouterr().out
    for client in DATASETS:
        table = (output_of(fedmepd, client).parent / "subsets.md").read_text()
        assert table.splitlines()[-1].startswith("|   ●   | ")
        assert out.count(f"\n{client}: {table}") == 1
    ran.clear()
    assert Inference.main(["--workspace", str(fedmepd), "--channels", "t2f"]) == 0
    assert all("--channels=t2f" in command for command in ran)
    assert all(output_of(fedmepd, client).with_name("imagesTs-FLAIR").is_dir() for client in DATASETS)


def use_one_sequence(workspace: Path, client: str) -> None:
    """A FedMEPDNet of FLAIR alone, and images of it."""
    folder = workspace / "sites" / client / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    parameters = sequence_parameters("FedMEPDNet", ("FLAIR",))
    export_sequences(folder, "FedMEPDNet", parameters, ("FLAIR",))
    for channel in (1, 2, 3):
        (workspace / "nnUNet_raw" / DATASETS[client] / "imagesTs" / f"a_01_{channel:04d}.nii.gz").unlink()


def test_channels_a_model_lacks_or_cannot_do_without_are_told(
    fedmepd: Path, classifier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Inference, "predict", lambda *args, **kwargs: pytest.fail("nothing must be loaded"))
        one = ("--workspace", fedmepd, "--clients", "client1")
        expected = "expected one or more of the model's ['T1', 'T1ce', 'T2', 'FLAIR']"
        assert f"client client1: channels ['ADC'], {expected}" in fails(capsys, *one, "--channels", "ADC")
        assert f"channels ['FLAIR', ''], {expected}" in fails(capsys, *one, "--channels", "FLAIR,")
        for option in (("--channels", "T2"), ("--every_subset",)):
            message = fails(capsys, "--workspace", fedmepd, "--clients", "client2", *option)
            assert "client client2: a classification model needs every channel" in message
        outside = fedmepd / "nnUNet_raw" / DATASETS["client1"] / "imagesTs"
        message = fails(capsys, *one, "--every_subset", "--input", outside)
        assert "client client1: --every_subset needs label maps" in message
        (fedmepd / "sites/client1/nnUNetTrainer__nnUNetPlans__3d_fullres/dataset.json").unlink()
        assert "dataset.json: file not found. Restore the model folder." in fails(capsys, *one, "--channels", "T2")


def test_a_stock_network_needs_every_channel(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "--workspace", workspace, "--clients", "client1", "--channels", "T2")
    assert "a PlainConvUNet, which needs every channel, not T2 alone" in message


def test_an_older_table_goes_before_the_first_subset(fedmepd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = output_of(fedmepd, "client1").parent
    predictions.mkdir()
    (predictions / "subsets.md").write_text("old")
    (fedmepd / "sites/client1/nnUNetTrainer__nnUNetPlans__3d_fullres/fold_all/checkpoint_final.pth").unlink()
    here = ("--workspace", fedmepd, "--clients", "client1", "--every_subset")
    assert "checkpoint_final.pth: missing" in fails(capsys, *here)
    assert (predictions / "subsets.md").exists()
    export_tiny(
        fedmepd / "sites/client1/nnUNetTrainer__nnUNetPlans__3d_fullres", random_parameters(11), mirroring_axes=None
    )
    assert "which needs every channel" in fails(capsys, *here)
    assert not (predictions / "subsets.md").exists()


def run_all(workspace: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """From another folder and without PYTHONPATH, as a user would call it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "nnUNet_raw")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        [sys.executable, Inference.__file__, "--workspace", ".", *options],
        cwd=workspace,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_clients_run_in_child_processes_and_fail_alone(workspace: Path) -> None:
    (workspace / "nnUNet_raw" / DATASETS["client2"] / "imagesTs" / "a_01_0002.nii.gz").unlink()
    done = run_all(workspace)
    assert done.returncode == 1
    assert (output_of(workspace, "client1") / "metrics.csv").is_file()
    assert done.stdout.count("no CUDA device") == 1
    assert done.stdout.splitlines()[-1].startswith("client1 ")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "client2: " in errors[0]
    assert "a_01_0002.nii.gz is missing" in errors[0]
    assert errors[1:] == ["error: 1 of 2 clients failed: client2; see above."]
    assert "Traceback" not in done.stderr


def test_user_errors_are_one_line(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = ("--workspace", workspace)
    assert "client1, client2." in fails(capsys, *here, "--clients", "client9")
    assert "--input" in fails(capsys, *here, "--input", tmp_path)
    assert "no folder of images" in fails(capsys, *here, "--clients", "client1", "--input", tmp_path / "absent")
    assert "checkpoint_best.pth" in fails(capsys, *here, "--clients", "client1", "--checkpoint", "best")
    (tmp_path / "file").touch()
    assert "cannot write to" in fails(capsys, *here, "--clients", "client1", "--output", tmp_path / "file" / "out")
    assert str(tmp_path / "nowhere" / "results.json") in fails(capsys, "--workspace", tmp_path / "nowhere")


def test_missing_folders_are_named(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace / "nnUNet_raw").rename(workspace / "moved")
    assert "nnUNet_raw is not set" in fails(capsys, "--workspace", workspace, "--clients", "client1")
    monkeypatch.setenv("nnUNet_raw", str(workspace / "other"))
    message = fails(capsys, "--workspace", workspace, "--clients", "client1")
    assert f"no data set Dataset901_Tiny in {workspace / 'other'} or {workspace / 'nnUNet_raw'}." in message
    (workspace / "other" / "Dataset901_Tiny").mkdir(parents=True)
    message = fails(capsys, "--workspace", workspace, "--clients", "client1")
    assert f"no folder of images {workspace / 'other' / 'Dataset901_Tiny' / 'imagesTs'}" in message
    (workspace / "sites" / "client1").rename(workspace / "gone")
    assert "model folder" in fails(capsys, "--workspace", workspace, "--clients", "client1")
    (workspace / "results.json").write_text("{")
    assert "not a job's results" in fails(capsys, "--workspace", workspace)


@pytest.mark.parametrize("there", ["environment", "workspace"])
def test_images_come_from_the_environment_or_else_the_workspace(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    """A cohort made for the job lies in the workspace even while nnUNet_raw is set."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "env"))
    expected = tmp_path / "env" if there == "environment" else workspace / "nnUNet_raw"
    (expected / "Dataset901_Tiny" / "imagesTs").mkdir(parents=True, exist_ok=True)
    works = Inference.plan(Inference.parse(["--workspace", str(workspace), "--clients", "client1"]))
    assert works[0].images == expected / "Dataset901_Tiny" / "imagesTs"


def test_gpu_ids_must_exist(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = fails(capsys, "--workspace", workspace, "--clients", "client1", "--gpu_ids", 1, 5)
    assert "--gpu_ids 5: no such GPU; this machine shows 2" in message


class FakeChild:
    """A child that ends at its third poll, and records what ran beside it."""

    running: list[str]
    seen: list[tuple[str, str, int]]

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.client = command[command.index("--clients") + 1]
        self.polls, self.returncode = 0, 1 if self.client == "c" else 0
        FakeChild.running.append(self.client)
        FakeChild.seen.append((self.client, env["CUDA_VISIBLE_DEVICES"], len(FakeChild.running)))

    def poll(self) -> int | None:
        self.polls += 1
        if self.polls == 3:
            FakeChild.running.remove(self.client)
        return self.returncode if self.polls >= 3 else None


def test_sites_go_round_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeChild.running, FakeChild.seen = [], []
    monkeypatch.setattr(subprocess, "Popen", FakeChild)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    works = [Inference.Work(c, Path("m"), Path("i"), Path("o"), None) for c in "abcd"]
    args = Inference.parse(["--workspace", "w", "--disable_tta"])
    assert Inference.run_side_by_side(works, args, [0, 1]) == ["c"]
    assert FakeChild.seen == [("a", "4", 1), ("b", "6", 2), ("c", "4", 1), ("d", "6", 2)]


@pytest.mark.parametrize(
    ("cores", "sites", "places", "threads"), [(1, 3, 1, "1"), (2, 3, 1, "2"), (8, 3, 3, "2"), (16, 2, 2, "8")]
)
def test_cores_are_divided(monkeypatch: pytest.MonkeyPatch, cores: int, sites: int, places: int, threads: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("nnUNet_def_n_proc", "3")
    assert Inference.cpu_places(sites) == [{"OMP_NUM_THREADS": threads}] * places


def test_termination_ends_the_children(workspace: Path, tmp_path: Path) -> None:
    """The children are stand-ins that sleep; they must be gone soon after SIGTERM to the parent."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, subprocess\n"
        f"sys.path.insert(0, {str(Path(Inference.__file__).parent)!r})\n"
        "import Inference\n"
        "def child(client, args):\n"
        "    code = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "    return [sys.executable, '-c', code]\n"
        "Inference.child_command = child\n"
        "sys.exit(Inference.run())\n"
    )
    parent = subprocess.Popen([sys.executable, script, "--workspace", workspace], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = next(int(line) for line in parent.stdout if line.strip().isdigit())
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
