"""What the server keeps on disk between rounds: the algorithm's state and how far the run has come.

One file per kind, replaced atomically: ``state.safetensors`` after the last round, ``state_before.safetensors`` after
the one before it, in case the newest is damaged, and ``best.safetensors``.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from fedcmt.algorithms.base import State
from fedcmt.params import load_newest, save_tensors

_STATE, _STATE_BEFORE, _BEST = "state.safetensors", "state_before.safetensors", "best.safetensors"
_NEEDED = ("record", "round", "best", "sites", "schedule_rounds", "contribution", "crossed")
"""What a state that a run can go on from says besides its tensors."""

_NO_BEST = (-math.inf, None)

Participation = dict[str, dict[str, Any]]
"""Site -> ``asked`` and ``took_part`` (rounds), ``absent`` (1-based round as text -> why); plain JSON."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come, and what its results will tell of its rounds; plain data.

    Attributes:
      schedule_rounds: Rounds that schedules are made for; they stay when a run is resumed for longer.
      round: The last finished one, 0-based; -1 before the first.
      best: The best mean validation score of a model that these sites received, and its round.
      sites: Who takes part, sorted.
      contribution: Sums over rounds of what sites' updates were worth.
      crossed: Scores of sites' models at other sites, of the last round.
      participation: Who took part in which round.
    """

    schedule_rounds: int
    round: int = -1
    best: tuple[float, int | None] = _NO_BEST
    sites: tuple[str, ...] = ()
    contribution: dict[str, Any] = field(default_factory=dict)
    crossed: dict[str, Any] = field(default_factory=dict)
    participation: Participation = field(default_factory=dict)

    def members(self) -> frozenset[str]:
        """Every site that has been part of the run, those that left included."""
        return frozenset({*self.sites, *self.participation})

    def taken_up_by(self, sites: Iterable[str]) -> Self:
        """The same with these sites; means over other sites do not compare, so the search for the best begins again."""
        sites = tuple(sorted(sites))
        return self if sites == self.sites else replace(self, sites=sites, best=_NO_BEST)


class StateFiles:
    """The state files of one job.

    Args:
      folder: Theirs.
      job: The job's name.
      federation: Its id; a state of another one, or of another job, is refused.
    """

    def __init__(self, folder: Path, job: str, federation: str) -> None:
        self._folder = folder
        self._owner = {"job": job, "federation": federation}

    def keep(self, state: State, progress: Progress) -> None:
        """Store the state after a round, and keep the one before it."""
        before = self._folder / _STATE_BEFORE
        if progress.round == 0:  # what is there is of an earlier run, which this one must never go back to
            before.unlink(missing_ok=True)
            self._save(_STATE, state, asdict(progress))
        else:
            self._save(_STATE, state, asdict(progress), before)

    def keep_best(self, state: State, score: float, round_idx: int) -> None:
        """Store the state that sites received in the round with the best score."""
        self._save(_BEST, state, {"round": round_idx, "best": [score, round_idx]})

    def load(self) -> tuple[State, Progress]:
        """The newest state that can be read.

        Raises:
          FileNotFoundError: If there is none.
          ParameterError: If neither the newest nor the one before it can be read, or they are another federation's.
        """
        newest, before = self._folder / _STATE, self._folder / _STATE_BEFORE
        tensors, meta = load_newest(newest, before, needs=_NEEDED, expects=self._owner)
        parts = {
            kind: {n.removeprefix(kind + "/"): t for n, t in tensors.items() if n.startswith(kind + "/")}
            for kind in ("params", "memory")
        }
        score, best_round = meta["best"]
        progress = Progress(
            meta["schedule_rounds"],
            meta["round"],
            (score, best_round),
            tuple(meta["sites"]),
            meta["contribution"],
            meta["crossed"],
            meta.get("participation", {}),
        )
        return State(parts["params"], parts["memory"], meta["record"]), progress

    def _save(self, name: str, state: State, said: Mapping[str, Any], before: Path | None = None) -> None:
        tensors = {f"params/{n}": t for n, t in state.params.items()} | {
            f"memory/{n}": t for n, t in state.memory.items()
        }
        meta = {**said, **self._owner, "record": state.record}
        save_tensors(self._folder / name, tensors, meta, before=before)
