"""The server's half of a job's privacy: it keeps the budget, bounds what arrives, and adds the noise.

An algorithm's mean over K sites is private if what each site adds to it is bounded and noise is added to the sum. Here
both happen on the updates, before the algorithm sees them: each is clipped to S again, counts like every other, and
carries noise whose sum over the K sites has the standard deviation z S. The mean then has z S / K, whatever the
algorithm does with it. An algorithm that looks at single updates gets each with noise of z S.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedcmt.algorithms.base import Algorithm, Participant, Update
from fedcmt.params import ParameterError, Tensors, norm
from fedcmt.privacy.accounting import Release
from fedcmt.privacy.clipping import clip_flat
from fedcmt.privacy.ledger import PrivacyLedger
from fedcmt.privacy.noise import NoiseSource, SecureNoise, SeededNoise, add_noise
from fedcmt.privacy.terms import PROTECTS, PrivacyTerms
from fedcmt.randomness import derive_seed

LEDGER_FILE = "privacy.jsonl"
_TAIL = 6.0
"""Standard deviations by which a noisy update's norm may exceed what is expected of it."""


@dataclass(frozen=True)
class Sampling:
    """How a site draws cases under ``instance_dp``.

    Attributes:
      rate: Probability with which a case takes part in a step, in (0, 1].
      steps: Noisy steps per round.
    """

    rate: float
    steps: int


class ServerPrivacy:
    """What the federation asks of a job's privacy; under ``none`` it changes nothing and keeps no ledger.

    Args:
      terms: The job's.
      algorithm: Its aggregation decides how much noise an update needs.
      folder: Of the server's state; the ledger is there.
      seed: The job's, for noise that is "seeded".
      num_sites: K, sites of the job.
      rounds_done: Of a federation that is resumed, which goes on with its ledger; a new one sets an older one aside.

    Raises:
      ValueError: If the algorithm cannot keep these terms, delta promises nothing to a single site where sites are what
        is protected, or the ledger has other terms or lacks a round.
    """

    def __init__(
        self,
        terms: PrivacyTerms,
        algorithm: Algorithm,
        folder: Path,
        *,
        seed: int,
        num_sites: int,
        rounds_done: int = 0,
    ) -> None:
        check_algorithm(terms, algorithm)
        if terms.formal and terms.clips_updates and not delta_covers_each(terms.delta, num_sites):
            raise ValueError(
                f"server.privacy.delta is {terms.delta:g}, expected below 1 / {num_sites}, the number of sites, which "
                f"{terms.mode} protects. Lower it: such a delta permits giving a whole site away."
            )
        if rounds_done == 0:
            set_aside(folder / LEDGER_FILE)
        self._terms = terms
        self._mean_only = algorithm.mean_only
        self._seed = seed
        self._num_sites = num_sites
        self._samplings: dict[str, Sampling] = {}
        self._shapes: Mapping[str, tuple[int, ...]] = {}
        self._ledger = open_ledger(terms, folder, range(rounds_done)) if terms.formal else None

    def admit(self, site: Participant, sampling: Mapping[str, Any] | None) -> None:
        """Take a prepared site in, with how it draws cases.

        Raises:
          ValueError: If it should say so and does not, or cannot be right; if it has so many cases that delta promises
            nothing to a single one; or if its tensors are not all other sites', under `distributed_client_dp`: a sum
            of fewer than K updates would have less noise than is counted.
        """
        if self._terms.mode == "distributed_client_dp":
            self._shapes = self._shapes or site.wire_shapes
            if self._shapes != site.wire_shapes:
                raise ValueError(
                    f"site {site.name!r}: exchanges other tensors than the sites before it; distributed_client_dp "
                    "needs every tensor to come from every site. Use central_client_dp or instance_dp."
                )
        if self._terms.mode != "instance_dp":
            return
        rate, steps = (None, None) if sampling is None else (sampling.get("rate"), sampling.get("steps"))
        if not (isinstance(rate, float) and 0 < rate <= 1 and isinstance(steps, int) and steps >= 1):
            raise ValueError(
                f"site {site.name!r}: sampling is {sampling!r}, expected a rate in (0, 1] and steps from 1"
            )
        if not delta_covers_each(self._terms.delta, site.num_cases):
            raise ValueError(
                f"site {site.name!r}: server.privacy.delta is {self._terms.delta:g}, expected below "
                f"1 / {site.num_cases}, its number of training cases. Lower it: such a delta permits giving a whole "
                "case away."
            )
        self._samplings[site.name] = Sampling(rate, steps)

    def check_budget(self) -> None:
        """Refuse a budget that the terms alone exhaust in the first round; call it before anything is asked of a site.

        Under `instance_dp` a round's cost depends on what sites say once they are prepared; each site checks that
        before it tells anything (`fedcmt.privacy.site_half.check_cases`).

        Raises:
          BudgetExceeded: If not a single round can be afforded.
        """
        if self._ledger is not None and self._terms.clips_updates:
            self._ledger.afford([Release(self._noise_multiplier)], round_idx=0)

    def note(self, kind: str, detail: str, round_idx: int | None = None) -> None:
        """Take down that something without noise was released."""
        if self._ledger is not None:
            self._ledger.note(kind, round_idx, detail)

    def open_round(self, round_idx: int, sites: Sequence[Participant]) -> None:
        """Take a round from the budget, before any site is asked to train.

        Raises:
          BudgetExceeded: If it cannot be afforded; nothing has been released then.
        """
        if self._ledger is None:
            return
        z = self._noise_multiplier
        if self._terms.clips_updates:
            self._ledger.spend("round", [Release(z)], round_idx, self._protects)
            return
        releases = {site.name: Release(z, *astuple(self._samplings[site.name])) for site in sites}
        for site, release in releases.items():  # all or none
            self._ledger.afford([release], round_idx=round_idx, site=site)
        for site, release in releases.items():
            self._ledger.spend("round", [release], round_idx, self._protects, site=site)

    def refusal(self, update: Update) -> str | None:
        """Why an update cannot be taken under these terms; None if it can."""
        if self._terms.formal and update.extras:
            return f"extras {sorted(update.extras)[:4]} have no noise under {self._terms.mode}"
        if self._terms.mode == "distributed_client_dp":
            values = sum(tensor.numel() for tensor in update.delta.values())
            most = self._terms.clip + self._update_noise(self._num_sites) * (math.sqrt(values) + _TAIL)
            if (length := norm(update.delta)) > most:
                return f"norm {length:.4g} is above {most:.4g}, all that clipping and noise explain"
        return None

    def protect(
        self,
        updates: Mapping[str, Update],
        turn: Sequence[Participant],
        frozen: Mapping[str, Collection[str]],
        round_idx: int,
        keep: Callable[[str, Tensors], Tensors] = lambda site, tensors: tensors,
    ) -> dict[str, Update]:
        """The updates as the algorithm may see them.

        Where only their mean is looked at, client modes give one for every site of the turn: the denominator must not
        depend on who answered, so zeros stand for a site that did not.

        Args:
          updates: By site, as they arrived.
          turn: The sites that were asked.
          frozen: Site to the wire names it was asked to leave out.
          round_idx: 0-based.
          keep: Where to hold what is made here, e.g. on disk.

        Raises:
          BudgetExceeded: If so few sites answered with their share of the noise that the round costs too much.
        """
        mode = self._terms.mode
        if mode in ("none", "instance_dp"):
            return dict(updates)
        if mode == "distributed_client_dp":
            self._spend_for_missing_noise(len(updates), round_idx)
        if self._terms.formal and self._mean_only:
            missing = [site for site in turn if site.name not in updates]
            updates = {**updates, **{site.name: _zero_update(site, frozen.get(site.name, ())) for site in missing}}
        return {
            site: replace(protected, delta=keep(site, protected.delta))
            for site in updates
            for protected in [self._protected(site, updates, round_idx)]
        }

    def summary(self, stopped: str | None) -> dict[str, Any] | None:
        """What the results say; None under ``none``.

        Args:
          stopped: Why training ended before its last round; None if it did not.
        """
        terms = self._terms
        if terms.mode == "none":
            return None
        told: dict[str, Any] = {"mode": terms.mode, "protects": PROTECTS[terms.mode], "epsilon": None}
        if self._ledger is None:
            return {**told, "statement": "no formal guarantee", "clip": terms.clip, "sigma": terms.sigma}
        told |= {"epsilon": self._ledger.epsilon(), "delta": terms.delta, "accountant": terms.accountant}
        told |= {"clip": terms.clip, "noise_multiplier": terms.noise_multiplier, "noise": terms.noise}
        return {**told, "max_epsilon": terms.max_epsilon, "not_covered": self._ledger.uncovered(), "stopped": stopped}

    @property
    def _noise_multiplier(self) -> float:
        assert self._terms.noise_multiplier is not None  # the terms are formal
        return self._terms.noise_multiplier

    @property
    def _protects(self) -> str:
        return PROTECTS[self._terms.mode] or ""

    def _spend_for_missing_noise(self, answered: int, round_idx: int) -> None:
        """Sites that did not answer leave their noise out of the sum: z sqrt(n / K) is what n of K give.

        Two Gaussian releases compose as 1/z^2 = 1/z_1^2 + 1/z_2^2, so what is missing is a further release.
        """
        assert self._ledger is not None
        if answered == self._num_sites:
            return
        further = self._noise_multiplier / math.sqrt(self._num_sites / answered - 1)
        self._ledger.record("noise missing in a round", [Release(further)], round_idx, self._protects)

    def _protected(self, site: str, updates: Mapping[str, Update], round_idx: int) -> Update:
        """One site's update, of weight 1, bounded and with the server's share of noise."""
        update = replace(updates[site], num_cases=1)
        if self._terms.mode == "distributed_client_dp":
            return update
        delta, _ = clip_flat(update.delta, self._terms.clip)
        senders = {name: sum(name in other.delta for other in updates.values()) for name in delta}
        stds = {name: self._update_noise(count) for name, count in senders.items()}
        return replace(update, delta=add_noise(delta, stds, self._source(site, round_idx)))

    def _update_noise(self, senders: int) -> float:
        """Standard deviation of the noise on one of the updates that a tensor's mean is over."""
        if self._terms.mode == "compat_noise":
            assert self._terms.sigma is not None
            return self._terms.sigma * math.sqrt(senders)
        whole = self._noise_multiplier * self._terms.clip
        return whole / math.sqrt(senders) if self._mean_only else whole

    def _source(self, site: str, round_idx: int) -> NoiseSource:
        return noise_source(self._terms, self._seed, "server", site, round_idx)


def noise_source(terms: PrivacyTerms, *seeds: int | str) -> NoiseSource:
    """The terms' kind of noise; seeds matter where it is "seeded"."""
    first, *others = seeds
    assert isinstance(first, int)
    return SecureNoise() if terms.noise == "secure" else SeededNoise(derive_seed(first, "privacy", *others))


def open_ledger(terms: PrivacyTerms, folder: Path, rounds: Collection[int]) -> PrivacyLedger:
    """The ledger in a folder, on these terms; see `PrivacyLedger` for ``rounds`` and what it raises."""
    return PrivacyLedger(
        folder / LEDGER_FILE,
        delta=terms.delta,
        max_epsilon=terms.max_epsilon,
        accountant=terms.accountant,
        rounds=rounds,
    )


def check_algorithm(terms: PrivacyTerms, algorithm: Algorithm) -> None:
    """Refuse terms that an algorithm would break.

    Raises:
      ValueError: With the reason.
    """
    name = type(algorithm).__name__
    if terms.formal and algorithm.sends_extras:
        raise ValueError(
            f"server.privacy: under {name} sites send tensors beside their updates, which no noise of {terms.mode} "
            "covers. Use another algorithm, or run without server.privacy."
        )
    if terms.clips_updates and algorithm.scopes.keep_everything:
        raise ValueError(f"server.privacy: {terms.mode} covers what sites send, and under {name} they send nothing")
    if terms.mode == "distributed_client_dp" and not algorithm.mean_only:
        raise ValueError(
            f"server.privacy: distributed_client_dp covers the sum of all updates, and {name}'s server works on single "
            "ones (their products or their differences). Use central_client_dp or instance_dp, or another algorithm."
        )


def delta_covers_each(delta: float, num_cases: int) -> bool:
    """Whether delta is below 1 / (number of protected units); from there on, giving one unit away is within it."""
    return delta * num_cases < 1


def set_aside(ledger: Path) -> None:
    """Rename the ledger of an earlier federation, if any; what it spent on the same cases is spent."""
    if not ledger.exists():
        return
    number = 1
    while (target := ledger.with_name(f"{ledger.stem}_earlier_{number}{ledger.suffix}")).exists():
        number += 1
    ledger.replace(target)


def _zero_update(site: Participant, frozen: Collection[str]) -> Update:
    delta = {name: torch.zeros(shape) for name, shape in site.wire_shapes.items() if name not in frozen}
    return Update(delta, num_cases=1, num_steps=0)


def check_update(privacy: ServerPrivacy, site: str, update: Update) -> Update:
    """The update, if these terms allow it.

    Raises:
      ParameterError: With the site's name and the reason.
    """
    if reason := privacy.refusal(update):
        raise ParameterError(f"update of site {site!r}: {reason}")
    return update
