"""A site's half of a job's privacy: bounds and noise on what it sends, and its own book of what that cost.

A site does not rely on the server for what it can do itself: it clips its update, adds its share of the noise under
``distributed_client_dp``, and under ``instance_dp`` refuses the round that would exceed the budget before it trains.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedcmt.params import Params, norm
from fedcmt.privacy.accounting import Release
from fedcmt.privacy.clipping import clip_flat
from fedcmt.privacy.ledger import PrivacyLedger
from fedcmt.privacy.noise import add_noise
from fedcmt.privacy.server_half import noise_source, open_ledger
from fedcmt.privacy.terms import PROTECTS, PrivacyTerms


class PrivacyError(RuntimeError):
    """What a site was about to send is not covered by the job's privacy."""


class SitePrivacy:
    """What a site does about its job's privacy terms; nothing under ``none``.

    Args:
      terms: The job's, as the server said them when the site joined.
      name: The site's.
      folder: Of the site's state; under ``instance_dp`` its ledger is there.
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
        if terms.mode == "instance_dp":
            assert terms.noise_multiplier is not None
            assert sampling_rate is not None
            self._release = Release(terms.noise_multiplier, sampling_rate, steps)
            last = range(rounds_done - 1, rounds_done) if rounds_done else ()
            self._ledger = open_ledger(terms, folder, last)

    def open_round(self, round_idx: int) -> None:
        """Take a round from the site's own budget, before its first step.

        Raises:
          BudgetExceeded: If it cannot be afforded.
        """
        if self._ledger is not None and self._release is not None:
            self._ledger.spend("round", [self._release], round_idx, PROTECTS[self.terms.mode] or "", site=self._name)

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
