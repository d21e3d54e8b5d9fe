"""Cutting data sets into sites: disjoint, nothing counted twice, the same again for the same seed."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from fedcmt.data.checks import DatasetError, check_dataset, list_cases, read_dataset_json
from fedcmt.data.phantoms import make_cohort
from fedcmt.data.split import dataset_names, main, make_cuts

# Of 13 cases 8 are "uint8" and 5 "float32".
UINT8, FLOAT32 = [f"u{i}" for i in range(8)], [f"f{i}" for i in range(5)]
SITES = ["Dataset701_A", "Dataset702_B", "Dataset703_C"]
COHORT: dict[str, Any] = {
    "source_id": 700,
    "by": "dtype",
    "domains": {"uint8": SITES[:2], "float32": SITES[2:]},
    "pooled": "Dataset704_Pooled",
    "max_training_cases": 2,
    "test_fraction": 0.25,
    "seed": 0,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnUNet_raw with one data set of 13 images of 6 x 7 x 8 voxels."""
    raw = tmp_path_factory.mktemp("source")
    folder = raw / "Dataset700_Source"
    rng = np.random.default_rng(0)
    for case in UINT8 + FLOAT32:
        label = np.zeros((8, 7, 6), np.uint8)
        label[2:5, 2:5, 2:4] = 1
        for path, array in (
            (f"imagesTr/{case}_0000.nii.gz", rng.normal(size=label.shape).astype(np.float32)),
            (f"labelsTr/{case}.nii.gz", label),
        ):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / path))
    dataset = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "x": 1}, "numTraining": 13}
    (folder / "dataset.json").write_text(json.dumps({**dataset, "file_ending": ".nii.gz"}))
    rows = [{"case": c, "dtype": d} for cases, d in ((UINT8, "uint8"), (FLOAT32, "float32")) for c in cases]
    (folder / "provenance.json").write_text(json.dumps(rows))
    return raw


def cases(folder: Path, split: str) -> list[str]:
    return list(list_cases(folder, read_dataset_json(folder), images=f"images{split}"))


def all_cases(folder: Path) -> list[str]:
    return cases(folder, "Tr") + cases(folder, "Ts")


def test_sites_and_their_training_and_test_cases_are_disjoint(source: Path, tmp_path: Path) -> None:
    *sites, _ = make_cuts(source, tmp_path, COHORT)
    counted = [case for site in sites for case in all_cases(site)]
    assert len(counted) == len(set(counted))
    assert [site.name for site in sites] == ["Dataset703_C", "Dataset701_A", "Dataset702_B"]


def test_sites_hold_cases_of_their_domain_only(source: Path, tmp_path: Path) -> None:
    make_cuts(source, tmp_path, COHORT)
    assert {case[0] for name in SITES[:2] for case in all_cases(tmp_path / name)} == {"u"}
    assert {case[0] for case in all_cases(tmp_path / SITES[2])} == {"f"}


def test_test_cases_are_set_aside_before_training_cases_are_limited(source: Path, tmp_path: Path) -> None:
    folders = make_cuts(source, tmp_path, {**COHORT, "max_training_cases": 3})
    # C: round(5 / 4) = 1 of 5 for testing, at most 3 of 4 to train; A, B: 4 each, 1 for testing, 3 to train.
    counts = [(len(cases(f, "Tr")), len(cases(f, "Ts"))) for f in folders]
    assert counts == [(3, 1), (3, 1), (3, 1), (9, 3)]


def test_the_pooled_set_is_the_union_of_the_sites(source: Path, tmp_path: Path) -> None:
    *sites, pooled = make_cuts(source, tmp_path, COHORT)
    for split in ("Tr", "Ts"):
        assert sorted(cases(pooled, split)) == sorted(case for site in sites for case in cases(site, split))


def test_the_cut_is_a_sound_data_set(source: Path, tmp_path: Path) -> None:
    for folder in make_cuts(source, tmp_path, COHORT):
        summary = check_dataset(folder, num_folds=None)
        assert summary.num_training == len(cases(folder, "Tr")) == read_dataset_json(folder)["numTraining"]
        assert summary.name == folder.name
        labels = sorted(path.name for path in (folder / "labelsTs").iterdir())
        assert labels == [f"{case}.nii.gz" for case in cases(folder, "Ts")]


def test_files_are_links_to_the_source(source: Path, tmp_path: Path) -> None:
    folder = make_cuts(source, tmp_path, COHORT)[0]
    links = [path for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs") for path in (folder / part).iterdir()]
    assert len(links) == 2 * len(all_cases(folder))
    assert all(path.is_symlink() and path.resolve().is_relative_to(source.resolve()) for path in links)
    assert all(path.resolve().name == path.name for path in links)


def test_data_sets_beside_their_source_move_with_it(source: Path, tmp_path: Path) -> None:
    raw, moved = tmp_path / "raw", tmp_path / "elsewhere" / "moved"
    shutil.copytree(source, raw)
    wanted = [(folder.name, all_cases(folder)) for folder in make_cuts(raw, raw, COHORT)]
    moved.parent.mkdir()
    raw.rename(moved)
    again = make_cuts(moved, moved, COHORT)
    assert [(folder.name, all_cases(folder)) for folder in again] == wanted
    link = again[0] / "labelsTr" / f"{cases(again[0], 'Tr')[0]}.nii.gz"
    assert link.is_symlink()
    assert link.resolve() == (moved / "Dataset700_Source" / "labelsTr" / link.name).resolve()


@pytest.mark.parametrize("cohort", [COHORT, {"cuts": [{**COHORT, "kind": "domains"}]}])
def test_a_kept_folder_whose_links_lead_nowhere_is_refused(cohort: dict, source: Path, tmp_path: Path) -> None:
    folder = make_cuts(source, tmp_path, cohort)[1]
    links = sorted((folder / "labelsTr").iterdir())
    for link in links:
        link.unlink()
        link.symlink_to("/gone/label.nii.gz")
    message = f"{folder.name}: labelsTr/{links[0].name} is a link to /gone/label.nii.gz, where .* no file .*delete"
    with pytest.raises(DatasetError, match=message):
        make_cuts(source, tmp_path, cohort)
    shutil.rmtree(folder)
    assert check_dataset(make_cuts(source, tmp_path, cohort)[1], num_folds=None).num_training == len(links)


def test_the_seed_decides_the_cut(source: Path, tmp_path: Path) -> None:
    cuts = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        (tmp_path / name).mkdir()
        cuts.append([all_cases(f) for f in make_cuts(source, tmp_path / name, {**COHORT, "seed": seed})])
    assert cuts[0] == cuts[1]
    assert cuts[0] != cuts[2]


def test_running_again_changes_nothing(source: Path, tmp_path: Path) -> None:
    first = make_cuts(source, tmp_path, COHORT)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert make_cuts(source, tmp_path, COHORT) == first
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_cut_that_was_interrupted_is_completed(source: Path, tmp_path: Path) -> None:
    wanted = [all_cases(folder) for folder in make_cuts(source, tmp_path, COHORT)]
    done = tmp_path / SITES[0]
    (done / "split.json").unlink()
    done.rename(tmp_path / f"{SITES[0]}.partial")
    assert [all_cases(folder) for folder in make_cuts(source, tmp_path, COHORT)] == wanted
    assert not list(tmp_path.glob("*.partial"))


def test_a_cut_that_was_interrupted_does_not_leak_into_another(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            make_cuts(source, tmp_path, {**COHORT, "max_training_cases": 4})
    assert len(list(tmp_path.glob("*.partial"))) == 1
    folders = make_cuts(source, tmp_path, {**COHORT, "max_training_cases": 1})
    assert [len(cases(folder, "Tr")) for folder in folders] == [1, 1, 1, 3]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_training_cases": 1}])
def test_another_cut_in_the_same_place_is_refused(change: dict, source: Path, tmp_path: Path) -> None:
    make_cuts(source, tmp_path, COHORT)
    with pytest.raises(FileExistsError, match=r"Dataset70._\w+ is there and was not made by this cut"):
        make_cuts(source, tmp_path, {**COHORT, **change})


def test_a_folder_somebody_else_made_is_refused_and_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / SITES[0]).mkdir()
    (tmp_path / SITES[0] / "own.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="Dataset701_A is there and was not made by this cut"):
        make_cuts(source, tmp_path, COHORT)
    assert [path.name for path in (tmp_path / SITES[0]).iterdir()] == ["own.txt"]


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ({"float32": [f"Dataset71{i}_S" for i in range(3)]}, "5 patients with dtype = 'float32' for 3 sites"),
        ({"int16": ["Dataset710_S"]}, r"0 patients with dtype = 'int16' .* knows dtype = 'float32', 'uint8'"),
    ],
)
def test_a_domain_without_enough_cases_is_refused(domains: dict, message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=message):
        make_cuts(source, tmp_path, {**COHORT, "domains": domains})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_fraction": 0.95}, "Dataset703_C: no training case: of 5 cases 5 are for testing .test_fraction 0.95"),
        ({"max_training_cases": 0}, "Dataset703_C: no training case: of 5 cases 1 are for testing .* at most 0 for"),
    ],
)
def test_a_site_without_training_cases_is_refused(change: dict, message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=message):
        make_cuts(source, tmp_path, {**COHORT, **change})
    assert not list(tmp_path.iterdir())


def test_missing_keys_of_a_cohort_are_named(source: Path, tmp_path: Path) -> None:
    cohort = {key: value for key, value in COHORT.items() if key not in ("by", "seed")}
    with pytest.raises(
        ValueError, match=r"keys \['seed', 'by'\] are missing; a cut of kind 'domains' needs \['kind', 'source_id'"
    ):
        make_cuts(source, tmp_path, cohort)


@pytest.mark.parametrize(
    "change",
    [
        {"pooled": SITES[0]},
        {"pooled": "Dataset701_Other"},
        {"domains": {"uint8": SITES[:2], "float32": SITES[1:]}},
    ],
)
def test_data_sets_of_one_name_or_id_are_refused(change: dict, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"each data set needs a name and an id of its own.*Dataset70"):
        make_cuts(source, tmp_path, {**COHORT, **change})
    assert not list(tmp_path.iterdir())


def test_a_source_without_provenance_is_refused(source: Path, tmp_path: Path) -> None:
    copied = tmp_path / "raw" / "Dataset700_Source"
    copied.mkdir(parents=True)
    for name in ("dataset.json", "imagesTr", "labelsTr"):
        (copied / name).symlink_to(source / "Dataset700_Source" / name)
    with pytest.raises(DatasetError, match=r"provenance\.json: file not found"):
        make_cuts(tmp_path / "raw", tmp_path / "cut", COHORT)


def test_a_cohort_without_pooled_set_has_its_sites_only(source: Path, tmp_path: Path) -> None:
    cohort = {key: value for key, value in COHORT.items() if key != "pooled"}
    assert [folder.name for folder in make_cuts(source, tmp_path, cohort)] == ["Dataset703_C", *SITES[:2]]
    assert dataset_names(cohort) == SITES
    assert dataset_names(COHORT) == [*SITES, "Dataset704_Pooled"]


# Patients dealt to sites

DEAL: dict[str, Any] = {
    "kind": "deal",
    "source_id": 700,
    "sites": dict.fromkeys(SITES, "segmentation"),
    "max_training_cases": 9,
    "test_fraction": 0.4,
    "seed": 0,
}


def test_a_patient_is_at_one_site_only(source: Path, tmp_path: Path) -> None:
    folders = make_cuts(source, tmp_path, {"cuts": [DEAL]})
    assert [folder.name for folder in folders] == SITES
    # 13 patients in turn: 5, 4, 4; of 5 round(2.0) = 2 for testing, of 4 round(1.6) = 2.
    assert [(len(cases(f, "Tr")), len(cases(f, "Ts"))) for f in folders] == [(3, 2), (2, 2), (2, 2)]
    assert sorted(case for folder in folders for case in all_cases(folder)) == sorted(UINT8 + FLOAT32)


def test_dealing_limits_training_cases_after_test_cases_are_set_aside(source: Path, tmp_path: Path) -> None:
    folders = make_cuts(source, tmp_path, {"cuts": [{**DEAL, "max_training_cases": 1}]})
    assert [(len(cases(f, "Tr")), len(cases(f, "Ts"))) for f in folders] == [(1, 2), (1, 2), (1, 2)]


def test_the_seed_decides_who_is_dealt_what(source: Path, tmp_path: Path) -> None:
    dealt = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        (tmp_path / name).mkdir()
        folders = make_cuts(source, tmp_path / name, {"cuts": [{**DEAL, "seed": seed}]})
        dealt.append([all_cases(folder) for folder in folders])
    assert dealt[0] == dealt[1]
    assert dealt[0] != dealt[2]
    assert dealt[0][0] != sorted(UINT8 + FLOAT32)[::3]


def test_several_cuts_come_in_their_order(source: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("Dataset700_Source", "Dataset800_Other"):
        (raw / name).symlink_to(source / "Dataset700_Source")
    deal = {**DEAL, "source_id": 800, "sites": {"Dataset801_D": "segmentation"}}
    cohort = {"cuts": [deal, {**COHORT, "kind": "domains"}]}
    (tmp_path / "cut").mkdir()
    names = [folder.name for folder in make_cuts(raw, tmp_path / "cut", cohort)]
    assert names == ["Dataset801_D", "Dataset703_C", *SITES[:2], "Dataset704_Pooled"]
    assert sorted(dataset_names(cohort)) == sorted(names)


def test_nothing_is_written_if_one_of_several_cuts_cannot_be(source: Path, tmp_path: Path) -> None:
    missing = {**DEAL, "source_id": 800, "sites": {"Dataset801_D": "segmentation"}}
    with pytest.raises(DatasetError, match=r"no folder Dataset800_\*"):
        make_cuts(source, tmp_path, {"cuts": [DEAL, missing]})
    assert not list(tmp_path.iterdir())


def test_more_sites_than_cases_allow_are_refused(source: Path, tmp_path: Path) -> None:
    sites = {f"Dataset71{i}_S": "segmentation" for i in range(7)}
    with pytest.raises(DatasetError, match="13 cases for 7 sites, which need 2 each"):
        make_cuts(source, tmp_path, {"cuts": [{**DEAL, "sites": sites}]})


BOXES = {"sites": {SITES[0]: "organ_boxes"}, "box_mm": [3, 4, 5]}


@pytest.mark.parametrize(
    ("cohort", "message"),
    [
        ({"cuts": []}, "expected either one cut or"),
        ({"cuts": [DEAL], "seed": 1}, "expected either one cut or .* alone"),
        (
            {"cuts": [{**DEAL, "kind": "thirds"}]},
            r"kind is 'thirds'; expected one of \['domains', 'deal', 'partition', 'channels'\]",
        ),
        ({"cuts": [COHORT]}, "kind is None"),
        ({"cuts": [{**DEAL, "by": "dtype"}]}, r"unknown keys \['by'\]; a cut of kind 'deal' knows"),
        ({**COHORT, "pool": "Dataset704_P"}, r"unknown keys \['pool'\]"),
        ({"cuts": [{**DEAL, "sites": {}}]}, "names no sites"),
        (
            {"cuts": [{**DEAL, "sites": {SITES[0]: "boxes"}}]},
            r"'boxes'.: expected one of \['segmentation', 'organ_boxes'",
        ),
        ({"cuts": [{**DEAL, "sites": {"HeadNeckA": "segmentation"}}]}, r"\['HeadNeckA'\] are no data set names"),
        ({"cuts": [{**DEAL, "box_mm": [3, 4, 5]}]}, "no site is of organ_boxes; remove it"),
        ({"cuts": [{**DEAL, **BOXES, "box_mm": [3, 4]}]}, r"box_mm is \[3, 4\]; expected three positive"),
        ({"cuts": [{**DEAL, **BOXES, "box_mm": [3, 0, 5]}]}, "expected three positive"),
        ({"cuts": [{**DEAL, "sites": BOXES["sites"]}]}, "box_mm is None"),
        ({**COHORT, "test_fraction": 1}, "test_fraction is 1; expected a number between 0 and 1"),
        (
            {"cuts": [DEAL, {**DEAL, "sites": {"Dataset801_D": "segmentation"}}]},
            r"source_id \[700, 700\] .*a patient is at two sites",
        ),
    ],
)
def test_a_cohort_that_makes_no_sense_is_refused(cohort: dict, message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_cuts(source, tmp_path, cohort)
    assert not list(tmp_path.iterdir())


# Patients dealt by a scheme

PARTITION: dict[str, Any] = {
    "kind": "partition",
    "source_id": 700,
    "scheme": "equal",
    "sites": SITES[:2],
    "strata": ["dtype"],
    "common_test": "Dataset705_Common",
    "pooled": "Dataset704_Pooled",
    "seed": 0,
}


def fold(folder: Path) -> dict[str, list[str]]:
    """The data set's only fold."""
    (only,) = json.loads((folder / "splits_final.json").read_text())
    return only


def test_a_partition_gives_every_data_set_its_cases_and_the_common_ones(source: Path, tmp_path: Path) -> None:
    a, b, common, pooled = make_cuts(source, tmp_path, {"cuts": [PARTITION]})
    # 13 * .15 = 1.95 common test and validation cases, rounded 2 each; 9 left as 5 and 4, of which 1 and 1 aside.
    assert [(len(cases(f, "Tr")), len(cases(f, "Ts"))) for f in (a, b, common, pooled)] == [
        (4, 1),
        (3, 1),
        (2, 2),
        (7, 2),
    ]
    assert sorted(all_cases(a) + all_cases(b) + all_cases(common)) == sorted(UINT8 + FLOAT32)
    for folder in (a, b, pooled):
        assert cases(folder, "Common") == cases(common, "Ts")
        assert cases(folder, "CommonVal") == cases(common, "Tr")
    for split in ("Tr", "Ts"):
        assert cases(pooled, split) == sorted(cases(a, split) + cases(b, split))
    assert dataset_names({"cuts": [PARTITION]}) == [folder.name for folder in (a, b, common, pooled)]


def test_a_partition_s_data_sets_are_sound(source: Path, tmp_path: Path) -> None:
    for folder in make_cuts(source, tmp_path, {"cuts": [PARTITION]}):
        assert check_dataset(folder, num_folds=None).num_training == len(cases(folder, "Tr"))
        for part in ("Tr", "Ts", *(["Common", "CommonVal"] if (folder / "imagesCommon").exists() else [])):
            labels = sorted(path.name.removesuffix(".nii.gz") for path in (folder / f"labels{part}").iterdir())
            assert labels == cases(folder, part)


def test_a_site_s_validation_cases_are_its_first_fold(source: Path, tmp_path: Path) -> None:
    a, b, common, pooled = make_cuts(source, tmp_path, {"cuts": [PARTITION]})
    for folder in (a, b, pooled):
        assert sorted(fold(folder)["train"] + fold(folder)["val"]) == cases(folder, "Tr")
    assert len(fold(a)["val"]) == 1
    assert sorted(fold(a)["val"] + fold(b)["val"]) == fold(pooled)["val"]
    assert not (common / "splits_final.json").exists()


def test_every_data_set_holds_the_whole_partition_and_its_checksum(source: Path, tmp_path: Path) -> None:
    folders = make_cuts(source, tmp_path, {"cuts": [PARTITION]})
    tables = {(folder / "partition.csv").read_bytes() for folder in folders}
    (table,) = tables
    checksum = hashlib.sha256(table).hexdigest()
    assert {(f / "partition.csv.sha256").read_text() for f in folders} == {f"{checksum}  partition.csv\n"}
    rows = [line.split(",") for line in table.decode().splitlines()]
    assert rows[0] == ["case", "patient", "site", "split", "stratum"]
    assert sorted(row[0] for row in rows if row[2:4] == [SITES[0], "test"]) == cases(folders[0], "Ts")
    assert {row[4] for row in rows[1:]} == {"uint8", "float32"}


def test_parts_that_are_not_asked_for_have_no_folders(source: Path, tmp_path: Path) -> None:
    bare = {key: value for key, value in PARTITION.items() if key not in ("common_test", "pooled")}
    nothing = dict.fromkeys(("val_fraction", "test_fraction", "common_val_fraction", "common_test_fraction"), 0)
    folders = make_cuts(source, tmp_path, {"cuts": [{**bare, **nothing}]})
    assert [len(cases(folder, "Tr")) for folder in folders] == [7, 6]
    expected = ["dataset.json", "imagesTr", "labelsTr", "partition.csv", "partition.csv.sha256", "split.json"]
    assert sorted(path.name for path in folders[0].iterdir()) == expected


def test_the_same_partition_again_changes_nothing(source: Path, tmp_path: Path) -> None:
    first = make_cuts(source, tmp_path, {"cuts": [PARTITION]})
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert make_cuts(source, tmp_path, {"cuts": [PARTITION]}) == first
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_partition_that_meets_another_one_writes_nothing(source: Path, tmp_path: Path) -> None:
    make_cuts(source, tmp_path, {"cuts": [{**PARTITION, "sites": SITES[1:], "pooled": "Dataset707_P"}]})
    there = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(FileExistsError, match="Dataset702_B is there and was not made by this cut"):
        make_cuts(source, tmp_path, {"cuts": [PARTITION]})
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_an_id_that_another_data_set_has_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "Dataset702_Other").mkdir()
    with pytest.raises(FileExistsError, match=r"its id is taken by \['Dataset702_Other'\]"):
        make_cuts(source, tmp_path, {"cuts": [PARTITION]})
    assert [path.name for path in tmp_path.iterdir()] == ["Dataset702_Other"]


def test_hard_links_are_files_of_the_source(source: Path, tmp_path: Path) -> None:
    folder = make_cuts(source, tmp_path, {"cuts": [PARTITION]}, links="hard")[0]
    for case in cases(folder, "Tr"):
        link = folder / "imagesTr" / f"{case}_0000.nii.gz"
        assert not link.is_symlink()
        assert link.samefile(source / "Dataset700_Source" / "imagesTr" / link.name)


def test_a_hard_link_that_cannot_be_made_names_the_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with pytest.raises(OSError, match=r"_0000\.nii\.gz: no hard link .* \(Invalid cross-device link\); use one disk"):
        make_cuts(source, tmp_path, {"cuts": [PARTITION]}, links="hard")


def test_brain_phantoms_are_dealt_evenly_by_tumour_volume(tmp_path: Path) -> None:
    spec = {
        "kind": "brain_mr",
        "style": "site_a",
        "num_train": 12,
        "num_test": 1,
        "seed": 1,
        "channels": ["T1", "FLAIR"],
    }
    make_cohort(tmp_path, {"Dataset700_Brain": {**spec, "shape_vox": [24, 26, 28]}})
    cut = {**PARTITION, "scheme": "proportions", "proportions": [0.75, 0.25], "strata": ["foreground_tertile"]}
    no_common = {"common_val_fraction": 0, "common_test_fraction": 0}
    kept = {key: value for key, value in cut.items() if key not in ("common_test", "pooled")}
    folders = make_cuts(tmp_path, tmp_path, {"cuts": [{**kept, **no_common}]})
    assert [len(all_cases(folder)) for folder in folders] == [9, 3]
    rows = [line.split(",") for line in (folders[0] / "partition.csv").read_text().splitlines()[1:]]
    assert sorted(row[4] for row in rows if row[2] == SITES[1]) == ["high", "low", "middle"]
    assert len(list((folders[0] / "imagesTr").iterdir())) == 2 * len(cases(folders[0], "Tr"))


# The command line


def command(source: Path, out: Path, *more: str, scheme: str = "equal") -> list[str]:
    return [
        "-d",
        "700",
        "--scheme",
        scheme,
        "--sites",
        "A:701",
        "B:702",
        "--raw",
        str(source),
        "--out",
        str(out),
        *more,
    ]


def test_the_command_makes_what_the_same_cut_makes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(source, tmp_path / "a", "--strata", "dtype", "--seed", "0", "--pooled", "Pooled:704")
    assert main([*arguments, "--common-test", "Common:705"]) == 0
    shown = capsys.readouterr().out
    made = make_cuts(source, tmp_path / "b", {"cuts": [PARTITION]})
    for folder in made:
        twin = tmp_path / "a" / folder.name
        assert (twin / "split.json").read_text() == (folder / "split.json").read_text()
    checksum = (made[0] / "partition.csv.sha256").read_text().split()[0]
    assert f"SHA-256 {checksum}" in shown
    assert re.search(r"Dataset701_A +3 +1 +1  float32: 2, uint8: 3", shown)
    assert "Skew: none. The sites' shares are alike" in shown


def test_the_command_deals_values_to_sites(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = ["--field", "dtype", "--values", "uint8=A,B", "float32=B", "--val-fraction", "0.2"]
    assert main(command(source, tmp_path, *values, scheme="by")) == 0
    assert {case[0] for case in all_cases(tmp_path / SITES[0])} == {"u"}
    assert {case[0] for case in all_cases(tmp_path / SITES[1])} == {"u", "f"}
    assert "Skew: label." in capsys.readouterr().out


def test_the_command_tells_of_unused_cases(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = ["--field", "dtype", "--values", "uint8=A,B"]
    assert main(command(source, tmp_path, *values, scheme="by")) == 0
    assert "5 of 13 cases are not used." in capsys.readouterr().out


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(source, tmp_path, "--dry-run", "--proportions", "0.7", "0.3", scheme="proportions")) == 0
    assert not list(tmp_path.iterdir())
    shown = capsys.readouterr().out
    assert "Skew: quantity." in shown
    assert "nothing is written" in shown


def test_the_command_reads_tables_where_it_runs(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"{case},{case[1]}" for case in UINT8 + FLOAT32]  # patient 0 has the cases u0 and f0
    (tmp_path / "patients.csv").write_text("\n".join(["case,patient", *lines]))
    monkeypatch.chdir(tmp_path)
    assert main(command(source, tmp_path, "--patients-csv", "patients.csv")) == 0
    a, b = ({case[1] for case in all_cases(tmp_path / name)} for name in SITES[:2])
    assert not a & b


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pooled", "P:701"], "each data set needs a name and an id of its own"),
        (["--alpha", "1"], r"keys \['alpha'\] are of no use to scheme 'equal'"),
        (["--strata", "grade"], r"provenance\.json: no case has a field 'grade'; there are \['dtype'\]"),
        (["--field", "dtype", "--values", "uint8=C"], r"--values 'uint8=C': \['C'\] are not among --sites"),
        (["--field", "dtype", "--values", "uint8"], "--values 'uint8': expected VALUE=NAME"),
        (["--field", "dtype", "--values", "x=A", "x=B"], "--values 'x=B': .* each value once"),
        (["--test-fraction", "0.9"], "whose sum is below 1"),
        (["--test-fraction", "0.8"], "Dataset701_A: 5 patients are too few"),
    ],
)
def test_the_command_says_what_is_wrong_and_writes_nothing(
    more: list[str], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(source, tmp_path, *more)) == 1
    assert re.search(f"^fedcmt.data.split: .*{message}", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_the_command_needs_a_raw_folder(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    assert main(["-d", "700", "--scheme", "equal", "--sites", "A:701"]) == 1
    assert "nnUNet_raw is not set" in capsys.readouterr().err


@pytest.mark.parametrize("site", ["A", "A:x", ":701", "A B:701", "A:7010"])
def test_a_site_that_is_no_name_and_id_is_refused(site: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["-d", "700", "--scheme", "equal", "--sites", site])
    assert "expected NAME:ID, e.g. SiteA:601" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Sites with some of the channels

CHANNELS = {"kind": "channels", "source_id": 710, "sites": {"Dataset711_C": ["T2"], "Dataset712_D": ["T2", "T1"]}}


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnUNet_raw with one data set of two cases, of which channel 0 (T1) is 10 and 20 and channel 1 (T2) 11 and 21."""
    raw = tmp_path_factory.mktemp("channels")
    folder = raw / "Dataset710_Two"
    for number, case in enumerate(("a", "b"), start=1):
        files = {f"imagesTr/{case}_000{channel}.nii.gz": 10 * number + channel for channel in (0, 1)}
        for path, value in {**files, f"labelsTr/{case}.nii.gz": 1}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(sitk.GetImageFromArray(np.full((4, 3, 2), value, np.uint8)), str(folder / path))
    dataset = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "x": 1}, "numTraining": 2}
    (folder / "dataset.json").write_text(json.dumps({**dataset, "file_ending": ".nii.gz"}))
    return raw


def test_a_site_gets_its_channels_of_every_case_in_its_own_order(two_channels: Path, tmp_path: Path) -> None:
    one, two = make_cuts(two_channels, tmp_path, {"cuts": [CHANNELS]})
    assert read_dataset_json(one)["channel_names"] == {"0": "T2"}
    assert read_dataset_json(two)["channel_names"] == {"0": "T2", "1": "T1"}
    values = {
        file.name: int(sitk.GetArrayFromImage(sitk.ReadImage(str(file))).max()) for file in (two / "imagesTr").iterdir()
    }
    assert values == {"a_0000.nii.gz": 11, "a_0001.nii.gz": 10, "b_0000.nii.gz": 21, "b_0001.nii.gz": 20}
    assert sorted(file.name for file in (one / "imagesTr").iterdir()) == ["a_0000.nii.gz", "b_0000.nii.gz"]
    assert sorted(file.name for file in (one / "labelsTr").iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_other_channels_in_the_same_place_are_refused(two_channels: Path, tmp_path: Path) -> None:
    make_cuts(two_channels, tmp_path, {"cuts": [CHANNELS]})
    other = {**CHANNELS, "sites": {**CHANNELS["sites"], "Dataset712_D": ["T1", "T2"]}}
    with pytest.raises(FileExistsError, match="Dataset712_D"):
        make_cuts(two_channels, tmp_path, {"cuts": [other]})


@pytest.mark.parametrize("channels", [[], ["T1", "T1"], ["T1", "FLAIR"]])
def test_channels_that_the_source_lacks_are_refused(channels: list[str], two_channels: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="channels of Dataset711_C"):
        make_cuts(two_channels, tmp_path, {"cuts": [{**CHANNELS, "sites": {"Dataset711_C": channels}}]})
    assert not any(tmp_path.iterdir())
