"""Generated cohorts: nnU-Net raw format, repeatable voxels, sites that differ, folders that are never overwritten."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fedcmt.data import phantoms
from fedcmt.data.checks import check_dataset
from fedcmt.data.phantoms import make_body_ct, make_brain_mr, make_cohort

SHAPE = (26, 30, 22)


def read(path: Path) -> np.ndarray:
    """[Z, Y, X]."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def volumes(folder: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(folder)): read(path) for path in sorted(folder.glob("*/*.nii.gz"))}


def brain(folder: Path, **changes: object) -> Path:
    request = {"num_train": 2, "num_test": 1, "seed": 3, "style": "site_a", "shape_vox": SHAPE} | changes
    return make_brain_mr(folder, **request)  # type: ignore[arg-type]


def body(folder: Path, **changes: object) -> Path:
    request = {"num_train": 6, "num_test": 3, "seed": 3, "style": "site_a", "shape_vox": (28, 26, 18)} | changes
    return make_body_ct(folder, **request)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def brain_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return brain(tmp_path_factory.mktemp("raw") / "Dataset501_BrainA")


@pytest.fixture(scope="module")
def body_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return body(tmp_path_factory.mktemp("raw") / "Dataset511_BodyA")


def test_both_kinds_pass_the_checks_made_before_training(brain_a: Path, body_a: Path) -> None:
    summary = check_dataset(brain_a, num_folds=None, channels=["T1", "T1ce", "T2", "FLAIR"])
    assert (summary.num_training, summary.num_test) == (2, 1)
    summary = check_dataset(body_a, channels=["CT"])
    assert (summary.num_training, summary.num_test, summary.labels["spleen"]) == (6, 3, 3)


def test_tumour_labels_are_declared_as_nested_regions(brain_a: Path) -> None:
    assert json.loads((brain_a / "dataset.json").read_text()) == {
        "channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"},
        "labels": {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": 3},
        "regions_class_order": [1, 2, 3],
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    for path in (brain_a / "labelsTr").iterdir():
        label = read(path)
        assert label.dtype == np.uint8
        assert set(np.unique(label)) == {0, 1, 2, 3}


def test_grid_is_oblique_anisotropic_and_in_x_y_z_order(brain_a: Path) -> None:
    image = sitk.ReadImage(str(brain_a / "imagesTr" / "BrainA_000_0000.nii.gz"))
    rotation = np.reshape(image.GetDirection(), (3, 3))
    assert image.GetSize() == SHAPE
    assert image.GetPixelID() == sitk.sitkFloat32
    np.testing.assert_allclose(image.GetSpacing(), phantoms.MR_STYLES["site_a"].spacing_mm, rtol=1e-6)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(rotation) == pytest.approx(1)
    assert not np.allclose(rotation, np.eye(3), atol=0.02)
    assert np.abs(image.GetOrigin()).min() > 1


def test_brain_is_skull_stripped_alike_in_all_channels_and_holds_the_tumour(brain_a: Path) -> None:
    masks = [read(brain_a / "imagesTr" / f"BrainA_000_{i:04d}.nii.gz") != 0 for i in range(4)]
    label = read(brain_a / "labelsTr" / "BrainA_000.nii.gz")
    assert all((mask == masks[0]).all() for mask in masks)
    assert 0.2 < masks[0].mean() < 0.7
    assert masks[0][label > 0].all()


def test_the_tumour_stops_at_the_brain() -> None:
    brain_mask = np.zeros(SHAPE, bool)
    brain_mask[8:14] = True
    tumours = [phantoms._tumour(np.random.default_rng(seed), brain_mask) for seed in range(5)]
    assert any(tumour[13].any() for tumour in tumours)
    assert not any(tumour[~brain_mask].any() for tumour in tumours)


@pytest.mark.parametrize("style", sorted(phantoms.MR_STYLES))
def test_each_sequence_shows_the_tumour_as_real_mr_does(style: str) -> None:
    spec = phantoms.BrainMRSpec(1, 0, 11, phantoms.MR_STYLES[style], SHAPE)
    cases = [spec.case(0, idx) for idx in range(4)]

    def mean(channel: int, label: int) -> float:
        images = [case.images[channel] / case.images[channel].max() for case in cases]
        inside = [image[(case.label == label) & (image > 0)] for image, case in zip(images, cases, strict=True)]
        return float(np.concatenate(inside).mean())

    brain_, oedema, core, enhancing = range(4)
    t1, t1ce, t2, flair = range(4)
    assert mean(t1, core) < mean(t1, oedema) < mean(t1, brain_)
    assert mean(t1ce, enhancing) > 1.15 * mean(t1ce, brain_)
    assert mean(t1ce, core) < mean(t1ce, brain_)
    assert mean(t2, oedema) > mean(t2, brain_)
    assert mean(flair, oedema) > mean(flair, brain_)


def test_no_single_threshold_finds_the_tumour() -> None:
    spec = phantoms.BrainMRSpec(1, 0, 5, phantoms.MR_STYLES["site_b"])
    case = spec.case(0, 0)
    for image in case.images:
        levels = np.percentile(image[image > 0], np.arange(2, 100, 2))
        masks = [image > level for level in levels] + [(image > 0) & (image < level) for level in levels]
        dice = [2 * (m & (case.label > 0)).sum() / (m.sum() + (case.label > 0).sum()) for m in masks]
        assert max(dice) < 0.9


def test_styles_change_the_images_but_not_the_patients(tmp_path: Path, brain_a: Path) -> None:
    other = volumes(brain(tmp_path / "Dataset502_BrainA", style="site_b"))
    for name, array in volumes(brain_a).items():
        if name.startswith("labels"):
            np.testing.assert_array_equal(other[name], array)
        elif name.endswith("_0000.nii.gz"):
            assert other[name].mean() < 0.6 * array.mean()


def test_a_sequence_does_not_depend_on_the_others(tmp_path: Path, brain_a: Path) -> None:
    one = brain(tmp_path / "Dataset502_BrainA", channels=["FLAIR"])
    image = read(one / "imagesTr" / "BrainA_001_0000.nii.gz")
    np.testing.assert_array_equal(image, read(brain_a / "imagesTr" / "BrainA_001_0003.nii.gz"))


@pytest.mark.parametrize("make", [brain, body])
def test_same_seed_same_arrays_other_seed_other_arrays(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    first, again, other = (
        volumes(make(tmp_path / f"Dataset{i}_Case", num_train=2, num_test=1, seed=seed))
        for i, seed in ((501, 1), (502, 1), (503, 2))
    )
    assert first.keys() == again.keys() == other.keys()
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)
    assert all(first[name].tobytes() != other[name].tobytes() for name in first)


def test_a_blank_sequence_changes_nothing_else(tmp_path: Path) -> None:
    whole = volumes(brain(tmp_path / "whole" / "Dataset501_A", channels=("T1", "T2")))
    part = volumes(brain(tmp_path / "part" / "Dataset501_A", channels=("T1", "T2"), blank=("T1",)))
    assert set(part) == set(whole)
    for name in whole:
        expected = np.zeros_like(whole[name]) if name.endswith("_0000.nii.gz") else whole[name]
        np.testing.assert_array_equal(part[name], expected)


def test_cases_differ_from_each_other(brain_a: Path) -> None:
    labels = [read(path) for path in sorted(brain_a.glob("labelsT?/*"))]
    assert len(labels) == 3
    assert all((a != b).any() for a, b in pairwise(labels))


def test_ct_is_in_hounsfield_units(body_a: Path) -> None:
    style = phantoms.CT_STYLES["site_a"]
    for idx in range(6):
        image, label = (
            read(body_a / f"imagesTr/BodyA_{idx:03d}_0000.nii.gz"),
            read(body_a / f"labelsTr/BodyA_{idx:03d}.nii.gz"),
        )
        assert image[:, 0, 0].mean() == pytest.approx(-1000, abs=20)
        assert np.median(image[label == 2]) == pytest.approx(style.kidney_hu, abs=45)
        assert np.median(image[label == 3]) == pytest.approx(style.spleen_hu, abs=35)
        assert image.max() > 250


def test_a_site_may_outline_fewer_organs_on_the_same_images(tmp_path: Path, body_a: Path) -> None:
    few = body(tmp_path / "Dataset512_BodyA", organs=["spleen", "liver"])
    assert json.loads((few / "dataset.json").read_text())["labels"] == {"background": 0, "spleen": 1, "liver": 2}
    name = "BodyA_000.nii.gz"
    np.testing.assert_array_equal(read(few / "labelsTr" / name) == 1, read(body_a / "labelsTr" / name) == 3)
    name = "BodyA_000_0000.nii.gz"
    np.testing.assert_array_equal(read(few / "imagesTr" / name), read(body_a / "imagesTr" / name))


def test_classes_cover_all_cases_evenly(body_a: Path) -> None:
    content = json.loads((body_a / "classes.json").read_text())
    cases = {path.name.removesuffix(".nii.gz") for path in body_a.glob("labelsT?/*")}
    assert content["classes"] == ["none", "cyst", "tumour"]
    assert content["cases"].keys() == cases
    training = [content["cases"][f"BodyA_{i:03d}"] for i in range(6)]
    assert sorted(training) == [0, 0, 1, 1, 2, 2]
    assert sorted(content["cases"].values()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_class_is_visible_in_the_liver_and_nowhere_else() -> None:
    rng = [np.random.default_rng(0) for _ in range(3)]
    organs = phantoms._abdominal_organs(np.random.default_rng(1), (40, 36, 20))
    style = phantoms.CTStyle((1, 1, 1), 10, 1e-3, 110, 120, 170, 150, tumour_hu=65)
    none, cyst, tumour = (
        phantoms._ct_image(r, organs, lesion, style) for r, lesion in zip(rng, phantoms.LESIONS, strict=True)
    )
    lesion = np.abs(none - cyst) > 50
    assert lesion.sum() > 30
    assert organs["liver"][lesion].all()
    np.testing.assert_array_equal(none[~organs["liver"]], tumour[~organs["liver"]])
    assert none[lesion].mean() == pytest.approx(110, abs=15)
    assert cyst[lesion].mean() == pytest.approx(6, abs=8)
    assert tumour[lesion].mean() == pytest.approx(65, abs=8)


# Cohorts


def request(**changes: object) -> dict[str, object]:
    return {
        "kind": "brain_mr",
        "style": "site_a",
        "num_train": 1,
        "num_test": 0,
        "seed": 1,
        "shape_vox": [22, 24, 20],
        "channels": ["T1"],
    } | changes


def test_cohort_is_made_once_and_kept(tmp_path: Path) -> None:
    wanted = {"Dataset501_A": request(), "Dataset502_B": request(seed=2, style="site_b")}
    folders = make_cohort(tmp_path / "raw", wanted)
    assert [folder.name for folder in folders] == list(wanted)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "raw").rglob("*")}
    assert make_cohort(tmp_path / "raw", wanted) == folders
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "raw").rglob("*")} == before
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == list(wanted)  # no scratch folder left


@pytest.mark.parametrize("change", [{"seed": 9}, {"style": "site_b"}, {"channels": ["T2"]}, {"num_test": 1}])
def test_another_spec_of_the_same_name_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    (folder,) = make_cohort(tmp_path, {"Dataset501_A": request()})
    before = volumes(folder)
    with pytest.raises(FileExistsError, match=r"Dataset501_A was generated from another spec.*Delete the folder"):
        make_cohort(tmp_path, {"Dataset502_B": request(), "Dataset501_A": request(**change)})
    assert all((before[name] == array).all() for name, array in volumes(folder).items())
    assert not (tmp_path / "Dataset502_B").exists()  # refused before anything is written


def test_a_new_generator_version_counts_as_another_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cohort(tmp_path, {"Dataset501_A": request()})
    monkeypatch.setattr(phantoms, "PHANTOM_VERSION", phantoms.PHANTOM_VERSION + 1)
    with pytest.raises(FileExistsError, match="another spec"):
        make_cohort(tmp_path, {"Dataset501_A": request()})


def test_real_images_are_never_touched(tmp_path: Path) -> None:
    real = tmp_path / "Dataset501_A" / "imagesTr" / "patient_0000.nii.gz"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"Dataset501_A exists and has no phantom.json.*Choose another"):
        make_cohort(tmp_path, {"Dataset501_A": request()})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [real]
    assert real.read_bytes() == b"precious"


def test_a_failure_midway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(phantoms, "write_json", fail)  # after the images
    with pytest.raises(OSError, match="disk full"):
        make_cohort(tmp_path, {"Dataset501_A": request()})
    assert list(tmp_path.iterdir()) == []


def test_two_sites_generating_at_once_end_with_one_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = phantoms._write_dataset

    def overtaken(folder: Path, spec: phantoms._Spec) -> None:
        write(folder, spec)
        write(tmp_path / "Dataset501_A", spec)  # the other site finishes first

    monkeypatch.setattr(phantoms, "_write_dataset", overtaken)
    assert make_cohort(tmp_path, {"Dataset501_A": request()}) == [tmp_path / "Dataset501_A"]
    assert [path.name for path in tmp_path.iterdir()] == ["Dataset501_A"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "knee"}, r"Dataset501_A: kind is 'knee'; known kinds are \['body_ct', 'brain_mr'\]"),
        ({"style": "site_z"}, r"Dataset501_A: style is 'site_z'; known styles are \['site_a', 'site_b'"),
        ({"colour": 1}, r"Dataset501_A: unknown keys \['colour'\]; brain_mr knows \['kind', 'num_train'"),
        ({"organs": ["liver"]}, r"unknown keys \['organs'\]"),
        ({"channels": ["PET"]}, r"Dataset501_A: brain_mr: channels is \('PET',\); expected .*'FLAIR'"),
        ({"channels": ["T1", "T1"]}, "each once"),
        ({"channels": ["T1"], "blank": ["T1"]}, "expected some, not all, of channels"),
        ({"num_train": 0}, "num_train is 0; expected an integer of at least 1"),
        ({"seed": -1}, "seed is -1; expected an integer of at least 0"),
        ({"shape_vox": [8, 8]}, "shape_vox is .*three positive integers"),
        ({"kind": "body_ct", "channels": ["T1"]}, r"unknown keys \['channels'\]; body_ct knows"),
    ],
)
def test_bad_requests_name_what_is_known(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cohort(tmp_path, {"Dataset501_A": request(**change)})
    assert list(tmp_path.iterdir()) == []


def test_missing_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Dataset501_A: missing keys \['num_test', 'seed', 'style'\]"):
        make_cohort(tmp_path, {"Dataset501_A": {"kind": "body_ct", "num_train": 1}})


def test_folder_name_must_be_a_dataset_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'BrainA' is no nnU-Net dataset folder.*Dataset501"):
        brain(tmp_path / "BrainA")


def test_a_grid_too_small_for_the_anatomy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="larger shape_vox"):
        brain(tmp_path / "Dataset501_A", shape_vox=(5, 6, 7))
    assert list(tmp_path.iterdir()) == []
