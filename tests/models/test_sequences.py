"""Names of MR sequences: which ones are the same, and which are refused."""

import pytest

from fedcmt.models.sequences import SEQUENCES, canonical


def test_canonical_names_are_themselves_and_any_order_stays() -> None:
    assert canonical(SEQUENCES) == ("FLAIR", "T1ce", "T1", "T2")
    assert canonical(["T2", "FLAIR"]) == ("T2", "FLAIR")
    assert canonical([]) == ()


@pytest.mark.parametrize(
    ("names", "sequence"),
    [
        (("flair", "FLAIR", "T2-FLAIR", "t2 flair", "t2f"), "FLAIR"),
        (("T1CE", "t1c", "T1Gd", "t1_ce", "T1 ce"), "T1ce"),
        (("t1", "T1w", "t1n"), "T1"),
        (("t2", "T2w"), "T2"),
    ],
)
def test_names_that_data_sets_use(names: tuple[str, ...], sequence: str) -> None:
    assert {canonical([name]) for name in names} == {(sequence,)}


def test_unknown_names_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"\['CT', 'PD'\] are no known MR sequences.*T1ce \(t1ce, t1c, t1gd\)"):
        canonical(["T1", "CT", "PD"])


def test_a_sequence_that_is_there_twice_is_refused_by_both_names() -> None:
    with pytest.raises(ValueError, match=r"\['t1gd', 'T1C'\] name one sequence twice"):
        canonical(["t1gd", "T1", "T1C"])
