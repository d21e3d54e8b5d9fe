import csv
import re
from pathlib import Path

import pytest

from fedcmt.evaluation.metrics import FolderScores
from fedcmt.evaluation.subsets import (
    SubsetError,
    chosen_sequences,
    folder_name,
    sequences_of,
    subsets_of,
    write_subsets,
)


def dataset_json(*channels: str) -> dict:
    return {"channel_names": {str(number): name for number, name in enumerate(channels)}}


def scores(cases: int, **dice: float) -> FolderScores:
    return FolderScores({f"c{number}": {} for number in range(cases)}, {"dice": dice}, hd95_penalty_mm=374.0)


def test_names_are_aliases_in_any_order() -> None:
    model = dataset_json("t1_gd", "T2w", "flair")
    assert sequences_of(model) == ("T1ce", "T2", "FLAIR")
    assert chosen_sequences(model, ["t2", "T2-FLAIR"]) == ("FLAIR", "T2")
    assert chosen_sequences(model, ["T2", "T1ce", "FLAIR"]) == ("FLAIR", "T1ce", "T2")


@pytest.mark.parametrize("names", [[], [""], ["T1"], ["FLAIR", "T1"], ["ADC"], ["T2", "t2w"]])
def test_names_the_model_lacks_are_refused_with_its_channels(names: list[str]) -> None:
    expected = f"channels {names}, expected one or more of the model's ['t1_gd', 'T2w', 'flair']"
    with pytest.raises(SubsetError, match=re.escape(expected)):
        chosen_sequences(dataset_json("t1_gd", "T2w", "flair"), names)


def test_a_model_of_other_channels_has_no_sequences() -> None:
    with pytest.raises(SubsetError, match=r"the model's channels \['CT'\]: \['CT'\] are no known MR sequences"):
        sequences_of(dataset_json("CT"))


def test_all_subsets_of_two_and_of_four() -> None:
    assert subsets_of(["T2", "FLAIR"]) == [("FLAIR",), ("T2",), ("FLAIR", "T2")]
    four = subsets_of(["T1", "T2", "FLAIR", "T1ce"])
    assert len(set(four)) == 15
    assert [len(subset) for subset in four] == [1] * 4 + [2] * 6 + [3] * 4 + [4]
    assert four[4] == ("FLAIR", "T1ce")
    assert four[14] == ("FLAIR", "T1ce", "T1", "T2")


def test_folders_are_named_after_images_and_sequences() -> None:
    assert folder_name("imagesTs", ("FLAIR", "T2")) == "imagesTs-FLAIR+T2"


def test_the_table_has_a_row_per_subset(tmp_path: Path) -> None:
    table = {
        ("FLAIR",): scores(2, oedema=0.5, core=0.25),
        ("T2",): scores(2, oedema=0.75, core=0.0),
        ("FLAIR", "T2"): scores(2, oedema=1.0, core=0.12345),
    }
    write_subsets(table, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"subsets.csv", "subsets.md"}
    with (tmp_path / "subsets.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["FLAIR", "T2", "oedema", "core", "mean_dice"],
            ["1", "0", "0.5", "0.25", "0.375"],
            ["0", "1", "0.75", "0.0", "0.375"],
            ["1", "1", "1.0", "0.12345", "0.561725"],
        ]
    assert (tmp_path / "subsets.md").read_text() == (
        "Mean Dice of 2 cases, by the sequences that the model was given (●).\n"
        "\n"
        "| FLAIR |  T2 | oedema |   core |   mean |\n"
        "| :---: | :-: | -----: | -----: | -----: |\n"
        "|   ●   |  ○  | 0.5000 | 0.2500 | 0.3750 |\n"
        "|   ○   |  ●  | 0.7500 | 0.0000 | 0.3750 |\n"
        "|   ●   |  ●  | 1.0000 | 0.1235 | 0.5617 |\n"
    )
