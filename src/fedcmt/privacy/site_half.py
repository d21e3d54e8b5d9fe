"""A site's half of a job's privacy: bounds and noise on what it sends, and its own book of what that cost.

A site does not rely on the server for what it can do itself: it clips its update, adds its share of the noise under
``distributed_client_dp``, and in every mode with an epsilon keeps a ledger of its own and refuses the round that would
exceed the budget before it trains. In client modes that ledger counts as the server's does, for one that believes the
terms: the noise of others, and their number, are what the server says.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedcmt.params import Params, norm
from fedcmt.privacy.accounting import Release
from fedcmt.privacy.clipping import clip_flat
from fedcmt.privacy.ledger import LedgerError, PrivacyLedger
from fedcmt.privacy.noise import add_noise
from fedcmt.privacy.server_half import LEDGER_FILE, delta_covers_each, noise_source, open_ledger
from fedcmt.privacy.terms import PROTECTS, PrivacyTerms


class PrivacyError(RuntimeError):
    """What a site was about to send is not covered by the job's privacy, or the terms cannot cover the site's data."""


class SitePrivacy:
    """What a site does about its job's privacy terms; nothing under ``none``.

    Args:
      terms: The job's, as the server said them when the site joined.
      name: The site's.
      folder: Of the site's state; in modes with an epsilon its ledger is there.
      seed: The job's, for noise that is "seeded".
      num_sites: K, sites of the job.
      sampling_rate: ``instance_dp`` only: probability with which a case takes part in a step.
      steps: Steps of a round.
      rounds_done: Where the site's state comes from a round, that round's number from 1; its ledger must have it.

    Raises:
      LedgerError: If the site's ledger has other terms or is damaged.
    """

    def __init__(
        self,
        terms: PrivacyTerms,
        *,
        name: str,
        folder: Path,
        seed: int,
        num_sites: int,
        sampling_rate: float | None,
        steps: int,
        rounds_done: int = 0,
    ) -> None:
        self.terms = terms
        self._name = name
        self._seed = seed
        self._num_sites = num_sites
        self._release: Release | None = None
        self._ledger: PrivacyLedger | None = None
        if terms.formal:
            self._release = _round_of(terms, sampling_rate, steps)
            last = range(rounds_done - 1, rounds_done) if rounds_done else ()
            self._ledger = open_ledger(terms, folder, last)

    def open_round(self, round_idx: int) -> None:
        """Take a round from the site's own budget, before its first step; once more each time it is asked for.

        Raises:
          BudgetExceeded: If it cannot be afforded.
        """
        if self._ledger is None or self._release is None:
            return
        self._ledger.spend("round", [self._release], round_idx, PROTECTS[self.terms.mode] or "", site=self._name)
        if self.terms.release_metrics:
            self._ledger.note("round metrics", round_idx, "loss and validation scores", site=self._name)

    @torch.no_grad()
    def after_step(self, parameters: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> None:
        """``compat_noise``: bring what is sent back into the ball of radius S around what was received, in place.

        Args:
          parameters: Parameter name to the tensor in training, of those that are sent.
          received: Parameter name to what was received.
        """
        if self.terms.mode != "compat_noise":
            return
        moved = {name: tensor.detach() - received[name] for name, tensor in parameters.items()}
        if (length := norm(moved)) > self.terms.clip:
            for name, tensor in parameters.items():
                tensor.copy_(received[name] + moved[name] * (self.terms.clip / length))

    def check_scoring(self) -> None:
        """Refuse to score a model for the server.

        Raises:
          PrivacyError: If the terms have an epsilon, which no score is part of.
        """
        if self.terms.formal:
            raise PrivacyError(f"site {self._name!r}: scores of models are not covered by {self.terms.mode}")

    def outgoing(self, delta: Params, extras: Params, round_idx: int) -> Params:
        """The update as it may leave.

        Raises:
          PrivacyError: If there are extras, which no noise covers, and the terms have an epsilon.
        """
        if self.terms.formal and extras:
            raise PrivacyError(f"site {self._name!r}: extras {sorted(extras)[:4]} are not covered by {self.terms.mode}")
        if not self.terms.clips_updates:
            return delta
        clipped, _ = clip_flat(delta, self.terms.clip)
        if self.terms.mode == "central_client_dp":
            return clipped
        assert self.terms.noise_multiplier is not None
        std = self.terms.noise_multiplier * self.terms.clip / self._num_sites**0.5
        return add_noise(clipped, std, noise_source(self.terms, self._seed, "site", self._name, round_idx))


def site_ledger(terms: PrivacyTerms, folder: Path, site: str) -> PrivacyLedger | None:
    """The ledger of a site, which is made if needed; None for terms that have no epsilon and so keep none.

    Args:
      terms: As the server says them.
      folder: Of the site's state.
      site: The site's name.

    Raises:
      LedgerError: If there is one that is damaged, has other terms, or is to be kept no longer.
    """
    if terms.formal:
        return open_ledger(terms, folder, ())
    if (path := folder / LEDGER_FILE).exists():
        raise LedgerError(
            f"site {site!r}: {path} is of a federation with a privacy budget, and the job's privacy mode is "
            f"{terms.mode!r}, which counts nothing. Go on with the terms that the ledger was kept on; another "
            f"federation needs a folder of its own, so move {folder} away first."
        )
    return None


def check_anew(ledger: PrivacyLedger | None, site: str) -> None:
    """Refuse to begin a federation where rounds have been charged: what they spent would be forgotten.

    Args:
      ledger: As `site_ledger` gives it.
      site: The site's name.

    Raises:
      LedgerError: If the ledger has rounds.
    """
    if ledger is not None and ledger.rounds:
        raise LedgerError(
            f"site {site!r}: the server begins a new federation, and {ledger.path} has {len(ledger.rounds)} rounds of "
            "one that began before. Have the server go on with that one (resume). A new one needs a folder of its own: "
            f"move {ledger.path.parent} away; what its ledger has spent adds to what the new federation spends."
        )


def check_cases(terms: PrivacyTerms, ledger: PrivacyLedger | None, *, site: str, num_cases: int, steps: int) -> None:
    """Refuse terms that cannot cover a site's cases, before anything of them is told.

    Args:
      terms: As the server says them.
      ledger: As `site_ledger` gives it.
      site: The site's name.
      num_cases: Its training cases.
      steps: Steps of a round.

    Raises:
      PrivacyError: Under ``instance_dp``, if a step is to draw more cases than there are, or if delta promises nothing
        to a single one.
      BudgetExceeded: If no round was made yet and the budget allows none.
    """
    if ledger is None:
        return
    rate = None
    if terms.mode == "instance_dp":
        assert terms.expected_batch is not None
        if terms.expected_batch > num_cases:
            raise PrivacyError(
                f"site {site!r}: server.privacy.expected_batch is {terms.expected_batch}, expected at most "
                f"{num_cases}, the number of training cases. Lower it."
            )
        if not delta_covers_each(terms.delta, num_cases):
            raise PrivacyError(
                f"site {site!r}: server.privacy.delta is {terms.delta:g}, expected below 1 / {num_cases}, the number "
                "of training cases. Lower it: such a delta permits giving a whole case away."
            )
        rate = terms.expected_batch / num_cases
    if not ledger.rounds:
        ledger.afford([_round_of(terms, rate, steps)], round_idx=0, site=site)


def _round_of(terms: PrivacyTerms, sampling_rate: float | None, steps: int) -> Release:
    """What a round releases under terms that have an epsilon."""
    assert terms.noise_multiplier is not None
    if terms.clips_updates:
        return Release(terms.noise_multiplier)
    assert sampling_rate is not None
    return Release(terms.noise_multiplier, sampling_rate, steps)
