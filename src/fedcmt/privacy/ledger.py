"""The privacy ledger: every release that touched private data, on disk before it leaves, and the budget that allows it.

A JSON line each. The first line holds the terms, every other one a release. A release with noise is covered: it counts
towards epsilon. One without is only written down, and no epsilon speaks for it.
"""

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedcmt.json_file import write_json
from fedcmt.privacy.accounting import ACCOUNTANTS, Accountant, Release, epsilon, require_delta
from fedcmt.settings import is_int, is_number, require

_TOLERANCE = 1e-3
"""Of a stored epsilon; another version of the accountant may round differently."""
_RELEASE = ("noise_multiplier", "sampling_rate", "count")
_KEYS = {"time", "kind", "site", "round", "protects", "covered", *_RELEASE, "detail", "epsilon_after"}


class BudgetExceeded(RuntimeError):
    """A release that the privacy budget does not allow; it was not made."""


class LedgerError(ValueError):
    """A ledger that is damaged, or kept on other terms."""


class PrivacyLedger:
    """The releases of one federation, or of one site, and their epsilon.

    Where sites draw their cases at different rates, each has a list of its own: a release of a site counts for that
    site, one without a site for every site, and the ledger's epsilon is the largest.

    One process may write at a time. A file that is there is read back; nothing in it is skipped or mended.

    Args:
      path: The ledger, JSON lines; its folder is made if needed.
      delta: From 1e-100, below 1, of every epsilon here.
      max_epsilon: The budget, > 0; None for none.
      accountant: "pld" or "rdp".
      rounds: 0-based rounds that were made, which the file must have.

    Raises:
      LedgerError: If the file lacks one of ``rounds``, has other terms, or a line, named by its number, that cannot be
        read. An incomplete last line is one: the process was killed while writing it. Its release was not made by this
        code, which writes first, but nobody can know that of what ran around it, so the conservative reading is that it
        was: whoever repairs the file completes the line.
      ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        path: Path,
        *,
        delta: float,
        max_epsilon: float | None,
        accountant: Accountant,
        rounds: Collection[int] = (),
    ) -> None:
        where = f"privacy ledger {path}"
        limited = is_number(max_epsilon) and max_epsilon > 0
        require_delta(where, delta)
        require(max_epsilon is None or limited, where, "max_epsilon", max_epsilon, "null or a number above 0")
        require(accountant in ACCOUNTANTS, where, "accountant", accountant, " or ".join(ACCOUNTANTS))
        self.path = path
        self._delta = delta
        self._max_epsilon = max_epsilon
        self._accountant = accountant
        self._spent: list[tuple[str | None, Release]] = []
        self._uncovered: list[str] = []
        self._rounds: set[int] = set()
        self._said: dict[str | None, tuple[int, int, float]] = {}
        terms = {"delta": delta, "max_epsilon": max_epsilon, "accountant": accountant}
        if path.exists():
            self._read(terms)
            self._check_epsilons()
        if missing := sorted(set(rounds) - self._rounds):
            raise LedgerError(
                f"{path}: has no line of round {missing[0] + 1}, which was made. Restore the ledger; without it "
                "what was spent is unknown."
            )
        if not path.exists():
            write_json(path, terms)
            _flush_folder(path.parent)  # a ledger that a crash loses has forgotten what was spent

    @property
    def rounds(self) -> frozenset[int]:
        """0-based rounds that were taken from the budget."""
        return frozenset(self._rounds)

    def afford(self, releases: Sequence[Release], *, round_idx: int | None = None, site: str | None = None) -> float:
        """What epsilon would be after these releases; writes nothing.

        Args:
          releases: With noise, at least one.
          round_idx: 0-based, for the message; None outside rounds.
          site: Whose data they are of; None for releases that count for every site.

        Returns:
          The site's epsilon; without a site the largest of all sites.

        Raises:
          BudgetExceeded: If it would be above the budget.
        """
        require(len(releases) > 0, f"privacy ledger {self.path}", "releases", releases, "at least one; or use `note`")
        after = self._after(releases, site)
        if self._max_epsilon is not None and after > self._max_epsilon:
            what = "this release" if round_idx is None else f"round {round_idx + 1}"
            whose = "" if site is None else f" of site {site!r}"
            raise BudgetExceeded(
                f"{what} would bring epsilon{whose} to {after:.3f} at delta {self._delta:g}, the budget max_epsilon is "
                f"{self._max_epsilon:g}. More noise or a larger budget is for a new federation, which does not undo "
                "what this one spent."
            )
        return after

    def spend(
        self, kind: str, releases: Sequence[Release], round_idx: int | None, protects: str, *, site: str | None = None
    ) -> float:
        """Take releases from the budget; call it before they are made.

        When it returns, the lines are on disk. A process that is killed afterwards has counted what it may not have
        sent, never the other way round.

        Args:
          kind: What is released, e.g. "round".
          releases: With noise, at least one; a line each, all with the epsilon after the last.
          round_idx: 0-based, None outside rounds.
          protects: The unit, e.g. "training case".
          site: As in `afford`.

        Returns:
          As `afford`.

        Raises:
          BudgetExceeded: If they are above the budget; nothing is written then.
        """
        after = self.afford(releases, round_idx=round_idx, site=site)
        self._spent += [(site, release) for release in releases]
        if round_idx is not None:
            self._rounds.add(round_idx)
        self._append(
            [_row(kind, round_idx, site=site, protects=protects, release=r, epsilon_after=after) for r in releases]
        )
        return after

    def record(self, kind: str, releases: Sequence[Release], round_idx: int | None, protects: str) -> float:
        """Take down releases that have been made already, whatever the budget says.

        Args and returns are those of `spend`.

        Raises:
          BudgetExceeded: If they are above the budget; they are written all the same.
        """
        after = self._after(releases, None)
        self._spent += [(None, release) for release in releases]
        self._append(
            [_row(kind, round_idx, site=None, protects=protects, release=r, epsilon_after=after) for r in releases]
        )
        if self._max_epsilon is not None and after > self._max_epsilon:
            raise BudgetExceeded(
                f"{kind} (round {(round_idx or 0) + 1}) has brought epsilon to {after:.3f} at delta {self._delta:g}, "
                f"above the budget max_epsilon {self._max_epsilon:g}."
            )
        return after

    def note(self, kind: str, round_idx: int | None, detail: str, *, site: str | None = None) -> None:
        """Write down a release without noise, which epsilon does not cover.

        Args:
          kind: What is released, e.g. "test scores".
          round_idx: 0-based, None outside rounds.
          detail: What of the data it tells.
          site: Whose data it is of; None for all sites.
        """
        self._uncovered.append(f"{kind}: {detail}")
        self._append([_row(kind, round_idx, site=site, detail=detail, epsilon_after=self.epsilon())])

    def epsilon(self) -> float | None:
        """Epsilon of the covered releases, the largest of all sites; None if there are none but others."""
        if not self._spent and self._uncovered:
            return None
        return self._after([], None)

    def uncovered(self) -> list[str]:
        """What was released without noise, as "kind: detail", each once, in order of first release."""
        return list(dict.fromkeys(self._uncovered))

    def _after(self, releases: Sequence[Release], site: str | None) -> float:
        return self._epsilon_of(self._spent, releases, site)

    def _epsilon_of(
        self, spent: Sequence[tuple[str | None, Release]], releases: Sequence[Release], site: str | None
    ) -> float:
        sites = {site} if site is not None else {None, *(owner for owner, _ in spent)}
        earlier = ([release for owner, release in spent if owner in (None, one)] for one in sites)
        return max(epsilon([*before, *releases], self._delta, self._accountant) for before in earlier)

    def _check_epsilons(self) -> None:
        """Compare what each site's last line says was spent with what the lines come to."""
        for site, (number, count, said) in self._said.items():
            spent = self._epsilon_of(self._spent[:count], [], site)
            if not math.isclose(said, spent, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
                raise self._damaged(number, f"epsilon_after is {said:.6g}, the lines so far come to {spent:.6g}")

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8") as ledger:
            ledger.write(lines)
            ledger.flush()
            os.fsync(ledger.fileno())

    def _read(self, terms: Mapping[str, Any]) -> None:
        *lines, rest = self.path.read_bytes().split(b"\n")
        if not lines and not rest:
            raise LedgerError(f"{self.path}: is empty. Restore it from a copy; without it what was spent is unknown.")
        for number, line in enumerate(lines, start=1):
            row = self._parse(number, line)
            if number == 1:
                self._check_terms(row, terms)
            else:
                self._take(number, row)
        if rest or not lines:
            raise LedgerError(
                f"{self.path}: line {len(lines) + 1} is incomplete: the process was killed while writing it. Count its "
                "release as spent: complete it after the pattern of the lines before it, with a line end."
            )

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:  # JSON's, or UTF-8's
            raise self._damaged(number, f"not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise self._damaged(number, f"expected a JSON object, found {type(row).__name__}")
        return row

    def _check_terms(self, kept: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        if set(kept) != set(asked):
            raise self._damaged(1, f"expected the terms {sorted(asked)}, found the keys {sorted(kept)}")
        other = [f"{key} is {asked[key]!r}, the ledger's is {kept[key]!r}" for key in asked if asked[key] != kept[key]]
        if other:
            raise LedgerError(
                f"{self.path}: {'; '.join(other)}. A ledger keeps the terms it began with, so go on with those. Only "
                "whoever answers for the data may change the budget: max_epsilon in the first line of this file, and "
                "the same in the job."
            )

    def _take(self, number: int, row: Mapping[str, Any]) -> None:
        """Count a line that was read back."""
        if set(row) != _KEYS:
            raise self._damaged(number, f"keys that differ from a release's: {sorted(set(row) ^ _KEYS)}")
        if not _is_sound(row):
            raise self._damaged(number, "kind, site, round, covered, detail or protects is not what it must be")
        if not row["covered"]:
            self._uncovered.append(f"{row['kind']}: {row['detail']}")
            return
        try:
            release = Release(row["noise_multiplier"], row["sampling_rate"], row["count"])
        except ValueError as error:
            raise self._damaged(number, str(error)) from error
        self._spent.append((row["site"], release))
        if not is_number(row["epsilon_after"]):
            raise self._damaged(number, f"epsilon_after is {row['epsilon_after']!r}, expected a number")
        self._said[row["site"]] = number, len(self._spent), row["epsilon_after"]
        if row["round"] is not None:
            self._rounds.add(row["round"])

    def _damaged(self, number: int, reason: str) -> LedgerError:
        return LedgerError(
            f"{self.path}: line {number} is damaged: {reason}. Restore it from a copy: without it nobody knows "
            "what was spent."
        )


def _row(
    kind: str,
    round_idx: int | None,
    *,
    site: str | None,
    epsilon_after: float | None,
    protects: str | None = None,
    release: Release | None = None,
    detail: str | None = None,
) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": kind,
        "site": site,
        "round": round_idx,
        "protects": protects,
        "covered": release is not None,
        **{key: getattr(release, key, None) for key in _RELEASE},
        "detail": detail,
        "epsilon_after": epsilon_after,
    }


def _is_sound(row: Mapping[str, Any]) -> bool:
    """Whether what counts in a line is of the right type; numbers of a release are checked by `Release`."""
    said = row["protects"] if row["covered"] is True else row["detail"]
    silent = row["covered"] is True or all(row[key] is None for key in _RELEASE)
    return (
        isinstance(row["covered"], bool)
        and isinstance(row["kind"], str)
        and isinstance(said, str)
        and (row["site"] is None or isinstance(row["site"], str))
        and (row["round"] is None or is_int(row["round"]))
        and silent
    )


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
