"""The ledger on disk: what was spent is there before anything is released, and stays spent."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcmt.privacy.accounting import Release, epsilon
from fedcmt.privacy.ledger import BudgetExceeded, LedgerError, PrivacyLedger

TERMS: dict[str, Any] = {"delta": 1e-5, "max_epsilon": 8.0, "accountant": "pld"}
Z4 = [Release(4.0)]


def opened(path: Path, **terms: Any) -> PrivacyLedger:
    return PrivacyLedger(path, **{**TERMS, **terms})


def spend(ledger: PrivacyLedger, round_idx: int, **more: Any) -> float:
    return ledger.spend("round", Z4, round_idx, "whole site", **more)


def rows(path: Path) -> list[dict[str, Any]]:
    """All lines but the terms."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "server" / "privacy.jsonl"


def test_t9_round_44_is_allowed_and_round_45_refused_also_after_opening_again(path: Path) -> None:
    ledger = opened(path)
    for round_idx in range(20):
        spend(ledger, round_idx)
    ledger = opened(path)
    for round_idx in range(20, 44):
        spend(ledger, round_idx)
    assert ledger.epsilon() == pytest.approx(7.955, abs=1e-3)
    before = path.read_bytes()
    for again in (ledger, opened(path)):
        with pytest.raises(BudgetExceeded, match=r"round 45 would bring epsilon to 8\.064 .* max_epsilon is 8\. More"):
            spend(again, 44)
        assert again.epsilon() == pytest.approx(7.955, abs=1e-3)
    assert path.read_bytes() == before


def test_t7_a_ledger_of_uncovered_releases_has_no_epsilon(path: Path) -> None:
    ledger = opened(path, max_epsilon=None)
    ledger.note("round", 0, "updates without calibrated noise")
    assert ledger.epsilon() is None
    assert rows(path)[0]["epsilon_after"] is None
    assert opened(path, max_epsilon=None).epsilon() is None


def test_a_new_ledger_has_its_terms_and_nothing_spent(path: Path) -> None:
    ledger = opened(path)
    assert ledger.epsilon() == 0
    assert ledger.uncovered() == []
    assert path.read_text() == '{"delta": 1e-05, "max_epsilon": 8.0, "accountant": "pld"}\n'


def test_a_ledger_knows_the_rounds_it_was_charged_for(path: Path) -> None:
    ledger = opened(path)
    spend(ledger, 0)
    spend(ledger, 2)
    spend(ledger, 2)
    ledger.note("round metrics", 5, "loss of each site")
    assert ledger.rounds == opened(path).rounds == {0, 2}


@pytest.mark.parametrize("delta", [0, 1e-300, 1, None])
def test_a_delta_that_no_accountant_takes_is_refused_before_there_is_a_file(path: Path, delta: object) -> None:
    with pytest.raises(ValueError, match=r"delta is .*, expected from 1e-100, below 1"):
        opened(path, delta=delta)
    assert not path.exists()


def test_the_budget_changes_in_the_first_line_and_in_the_job_or_not_at_all(path: Path) -> None:
    spent = spend(opened(path), 0)
    with pytest.raises(
        LedgerError, match=r"max_epsilon is 9\.0, the ledger's is 8\.0.*this file, and the same in the job"
    ):
        opened(path, max_epsilon=9.0)
    path.write_text(path.read_text().replace('"max_epsilon": 8.0', '"max_epsilon": 9.0'))
    with pytest.raises(LedgerError, match=r"max_epsilon is 8\.0, the ledger's is 9\.0"):
        opened(path)
    assert opened(path, max_epsilon=9.0).epsilon() == spent


def test_a_line_says_what_was_spent_on_what(path: Path) -> None:
    after = opened(path).spend("round", [Release(4.0, 0.5, 3)], 6, "training case", site="north")
    (row,) = rows(path)
    assert row.pop("time").endswith("+00:00")
    assert row == {
        "kind": "round",
        "site": "north",
        "round": 6,
        "protects": "training case",
        "covered": True,
        "noise_multiplier": 4.0,
        "sampling_rate": 0.5,
        "count": 3,
        "detail": None,
        "epsilon_after": after,
    }
    assert after == epsilon([Release(4.0, 0.5, 3)], 1e-5)


def test_several_releases_are_spent_at_once(path: Path) -> None:
    ledger = opened(path)
    after = ledger.spend("planning statistics", [Release(4.0), Release(2.0)], None, "whole site")
    assert [row["noise_multiplier"] for row in rows(path)] == [4.0, 2.0]
    assert {row["epsilon_after"] for row in rows(path)} == {after}
    assert after == ledger.epsilon() == opened(path).epsilon() == epsilon([Release(4.0), Release(2.0)], 1e-5)


def test_a_note_is_written_down_and_costs_nothing(path: Path) -> None:
    ledger = opened(path)
    spent = spend(ledger, 0)
    ledger.note("round metrics", 0, "loss of each site", site="north")
    ledger.note("round metrics", 1, "loss of each site", site="north")
    ledger.note("test scores", None, "means over cases")
    row = rows(path)[1]
    assert (row["covered"], row["round"], row["site"], row["detail"]) == (False, 0, "north", "loss of each site")
    assert [row[key] for key in ("noise_multiplier", "sampling_rate", "count", "protects")] == [None] * 4
    for again in (ledger, opened(path)):
        assert again.uncovered() == ["round metrics: loss of each site", "test scores: means over cases"]
        assert again.epsilon() == spent == row["epsilon_after"]


def test_asking_what_is_affordable_writes_nothing(path: Path) -> None:
    ledger = opened(path)
    before = path.read_bytes()
    assert ledger.afford(Z4) == epsilon(Z4, 1e-5)
    assert ledger.afford(Z4 * 44) == pytest.approx(7.955, abs=1e-3)
    with pytest.raises(BudgetExceeded, match=r"this release would bring epsilon to 8\.064 at delta 1e-05"):
        ledger.afford(Z4 * 45)
    with pytest.raises(BudgetExceeded, match="round 3 would bring epsilon of site 'north' to"):
        ledger.afford(Z4 * 45, round_idx=2, site="north")
    assert path.read_bytes() == before
    assert ledger.epsilon() == 0


def test_a_budget_that_is_met_exactly_is_kept(path: Path) -> None:
    ledger = opened(path, max_epsilon=epsilon(Z4, 1e-5))
    spend(ledger, 0)
    with pytest.raises(BudgetExceeded):
        spend(ledger, 1)


def test_without_a_budget_everything_is_counted_and_nothing_refused(path: Path) -> None:
    ledger = opened(path, max_epsilon=None)
    assert ledger.spend("round", [Release(0.01, count=50)], 0, "whole site") > 1e5


def test_the_lines_are_on_disk_before_the_release(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = opened(path)
    seen: list[str] = []

    def flush(descriptor: int) -> None:
        seen.append(path.read_text())

    monkeypatch.setattr(os, "fsync", flush)
    spend(ledger, 0)
    assert [text.count("\n") for text in seen] == [2]


def test_a_line_that_could_not_be_written_counts_as_spent(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = opened(path)

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        spend(ledger, 0)
    assert ledger.epsilon() == epsilon(Z4, 1e-5)


def test_sites_have_lists_of_their_own_and_the_largest_counts(path: Path) -> None:
    ledger = opened(path)
    often, rarely = [Release(1.0, 0.2, 10)], [Release(1.0, 0.02, 10)]
    assert ledger.spend("round", often, 0, "training case", site="often") == epsilon(often, 1e-5)
    assert ledger.spend("round", rarely, 0, "training case", site="rarely") == epsilon(rarely, 1e-5)
    assert ledger.afford(rarely, site="rarely") == epsilon(rarely * 2, 1e-5)
    for again in (ledger, opened(path)):
        assert again.epsilon() == epsilon(often, 1e-5)


def test_a_release_without_a_site_counts_for_every_site(path: Path) -> None:
    ledger = opened(path)
    steps, whole = [Release(1.0, 0.2, 10)], [Release(4.0)]
    ledger.spend("round", steps, 0, "training case", site="x")
    after = ledger.spend("planning statistics", whole, None, "training case")
    assert after == ledger.epsilon() == epsilon([*steps, *whole], 1e-5)
    assert ledger.afford(steps, site="newcomer") == epsilon([*steps, *whole], 1e-5)


def test_one_site_s_budget_is_not_another_s(path: Path) -> None:
    ledger = opened(path)
    for round_idx in range(44):
        spend(ledger, round_idx, site="x")
    assert spend(ledger, 44, site="y") == epsilon(Z4, 1e-5)
    with pytest.raises(BudgetExceeded, match="of site 'x'"):
        spend(ledger, 44, site="x")
    with pytest.raises(BudgetExceeded, match="this release would bring epsilon to"):
        ledger.afford(Z4)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"delta": 1e-6}, r"delta is 1e-06, the ledger's is 1e-05"),
        ({"accountant": "rdp"}, r"accountant is 'rdp', the ledger's is 'pld'"),
        ({"max_epsilon": 9.0}, r"max_epsilon is 9\.0, the ledger's is 8\.0"),
        ({"max_epsilon": 7.0}, r"max_epsilon is 7\.0, the ledger's is 8\.0"),
        ({"max_epsilon": None}, r"max_epsilon is None, the ledger's is 8\.0"),
    ],
)
def test_other_terms_are_refused_by_name(path: Path, other: dict[str, Any], message: str) -> None:
    spend(opened(path), 0)
    with pytest.raises(LedgerError, match=rf"privacy\.jsonl: {message}\. A ledger keeps the terms it began with"):
        opened(path, **other)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"delta": 0}, "delta is 0"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"max_epsilon": 0}, "max_epsilon is 0"),
        ({"max_epsilon": math.inf}, "max_epsilon is inf"),
        ({"accountant": "prv"}, "accountant is 'prv', expected pld or rdp"),
    ],
)
def test_terms_out_of_range_are_refused_and_nothing_is_written(path: Path, terms: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(path, **terms)
    assert not path.exists()


def change(path: Path, number: int, edit: Callable[[dict], Any]) -> None:
    """Write one line, counted from 1, anew."""
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps(edit(json.loads(lines[number - 1])))
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda row: {**row, "noise_multiplier": -4}, "noise_multiplier is -4"),
        (lambda row: {**row, "noise_multiplier": None}, "noise_multiplier is None"),
        (lambda row: {**row, "sampling_rate": 2}, "sampling_rate is 2"),
        (lambda row: {**row, "count": 0}, "count is 0"),
        (lambda row: {**row, "covered": False}, "covered, detail or protects is not"),
        (lambda row: {**row, "covered": 1}, "covered, detail or protects is not"),
        (lambda row: {**row, "protects": None}, "covered, detail or protects is not"),
        (lambda row: {**row, "site": 3}, "kind, site, round"),
        (lambda row: {**row, "round": 0.5}, "kind, site, round"),
        (lambda row: {k: v for k, v in row.items() if k != "count"}, r"keys that differ .*\['count'\]"),
        (lambda row: {**row, "more": 1}, r"keys that differ .*\['more'\]"),
        (lambda row: [row], "expected a JSON object, found list"),
    ],
)
def test_a_damaged_line_is_refused_by_number(path: Path, edit: Callable[[dict], Any], reason: str) -> None:
    ledger = opened(path)
    for round_idx in range(3):
        spend(ledger, round_idx)
    change(path, 3, edit)
    with pytest.raises(LedgerError, match=rf"privacy\.jsonl: line 3 is damaged: .*{reason}"):
        opened(path)


@pytest.mark.parametrize("line", [b"", b"{", b"\xff\xfe"])
def test_a_line_that_is_no_json_is_refused_by_number(path: Path, line: bytes) -> None:
    spend(opened(path), 0)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(LedgerError, match=r"line 3 is damaged: not valid JSON"):
        opened(path)


def test_terms_that_are_none_are_refused(path: Path) -> None:
    opened(path)
    change(path, 1, lambda terms: {"delta": terms["delta"]})
    with pytest.raises(LedgerError, match=r"line 1 is damaged: expected the terms .* found the keys \['delta'\]"):
        opened(path)


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_line_that_a_killed_process_left_incomplete_is_refused(path: Path, left: int) -> None:
    ledger = opened(path)
    spend(ledger, 0)
    whole = path.read_bytes()
    spend(ledger, 1)
    last = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + last[:left])
    with pytest.raises(LedgerError, match=r"line 3 is incomplete: .* Count its release as spent"):
        opened(path)
    path.write_bytes(whole + last)
    assert opened(path).epsilon() == ledger.epsilon()


def test_an_empty_file_is_no_ledger(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with pytest.raises(LedgerError, match="is empty"):
        opened(path)


def test_spending_nothing_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"releases is \[\], expected at least one"):
        opened(path).spend("round", [], 0, "whole site")


@pytest.mark.parametrize("key", ["noise_multiplier", "sampling_rate", "count", "epsilon_after"])
def test_a_number_that_changed_on_disk_is_noticed(path: Path, key: str) -> None:
    ledger = opened(path)
    ledger.spend("round", [Release(4.0, 0.5, 2)], 0, "training case", site="a")
    ledger.spend("round", [Release(4.0, 0.5, 2)], 1, "training case", site="a")
    terms, *lines = path.read_text().splitlines()
    changed = [json.loads(line) for line in lines]
    changed[1 if key == "epsilon_after" else 0][key] *= 2
    path.write_text("\n".join([terms, *map(json.dumps, changed)]) + "\n")
    with pytest.raises(LedgerError, match=r"line 3 is damaged: epsilon_after is [\d.]+, the lines so far come to"):
        opened(path)
