"""What the server learns of the sites in a round: where their updates point, and scores of models made from them.

The server has no images. Models that it makes up, of a coalition's updates or of one site's, are scored by the sites:
each loads what it exchanges, keeps its own personal tensors, and validates on its own patches (`Task.EVALUATE`).
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from fedcmt.algorithms.base import Payload, Update
from fedcmt.algorithms.conflict_averse import GramMatrix
from fedcmt.algorithms.fedavg import weighted_mean
from fedcmt.config import ContributionConfig
from fedcmt.evaluation.contribution import Game, directions, play
from fedcmt.messages import Channel, Failure, Message, Task
from fedcmt.params import Selection
from fedcmt.settings import is_number

logger = logging.getLogger(__name__)


class ScoringError(RuntimeError):
    """A site gave no usable score, so that what needs the scores of all is not defined."""


@dataclass
class Assessment:
    """What a round says of its sites; turns are compared each for itself.

    Attributes:
      sites: Site to ``cases``, ``case_share`` (p), ``norm``, ``cos_mean``, ``cos_loo``, ``loo`` and ``phi``, as far as
        they are known.
      cosines: ``a-b`` to the cosine of two sites' updates.
      games: A summary of each turn's game.
      cross_site: Whose model -> where it was evaluated -> score in [0, 1]; None where labels differ or none came.
      heads: Where models were evaluated -> with ``own`` output layers or with those ``received`` with the model.
    """

    sites: dict[str, dict[str, float]] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)
    games: list[dict[str, float]] = field(default_factory=list)
    cross_site: dict[str, dict[str, float | None]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)

    def add_directions(self, updates: Mapping[str, Update]) -> None:
        """Tier 0 of a turn, over the tensors of `comparable`."""
        cases = sum(update.num_cases for update in updates.values())
        for site, update in sorted(updates.items()):
            self.sites[site] = {"cases": update.num_cases, "case_share": update.num_cases / cases}
        gram = GramMatrix()
        for site, tensors in comparable(updates).items():
            gram.add(site, tensors)
        if not gram.sites:
            return
        found = directions(gram.matrix(), [updates[site].num_cases for site in gram.sites])
        for i, site in enumerate(gram.sites):
            values = (found.norms[i], found.cos_mean[i], found.cos_loo[i])
            self.sites[site] |= dict(zip(("norm", "cos_mean", "cos_loo"), map(float, values), strict=True))
            for j in range(i + 1, len(gram.sites)):
                self.cosines[f"{site}-{gram.sites[j]}"] = float(found.cosines[i, j])

    def add_game(self, game: Game | None) -> None:
        """A turn's values of tiers 1 to 3, if there are any."""
        if game is None:
            return
        for site, values in game.values.items():
            self.sites[site] |= values
        self.games.append(game.summary())

    def add_cross_site(self, scores: Mapping[str, dict[str, float | None]], heads: Mapping[str, str]) -> None:
        """What `SiteScores.cross_site` found for a turn."""
        self.cross_site |= scores
        self.heads |= heads

    def crossed(self) -> dict[str, dict]:
        """What ``results.json`` says of models at other sites; nothing in a round that did not evaluate them."""
        return {"cross_site": self.cross_site, "cross_site_heads": self.heads} if self.cross_site else {}

    def curves(self) -> dict[str, float]:
        """For TensorBoard, by field and site."""
        fields = ("cos_mean", "cos_loo", "loo", "phi")
        curves = {f"{key}/{site}": row[key] for site, row in self.sites.items() for key in fields if key in row}
        curves |= {f"update_norm/{site}": row["norm"] for site, row in self.sites.items() if "norm" in row}
        return curves | {f"update_cosine/{pair}": value for pair, value in self.cosines.items()}


def comparable(updates: Mapping[str, Update]) -> dict[str, Selection]:
    """The tensors that most sites sent, of the sites that sent all of these.

    As a rule these are the tensors that every site sent: group tensors travel from the sites of one modality only, and
    tensors of which sites send different rows compare to none. A
    site that trains behind a frozen encoder has none of them and is left out; so are all, if no site sent all of them.
    """
    forms = {name: tensor.shape for update in updates.values() for name, tensor in update.delta.items()}
    alike = {
        name for name in forms if all(u.delta[name].shape == forms[name] for u in updates.values() if name in u.delta)
    }
    senders = Counter(name for update in updates.values() for name in update.delta if name in alike)
    names = [name for name, count in sorted(senders.items()) if count == max(senders.values())]
    members = {site: u for site, u in updates.items() if names and all(name in u.delta for name in names)}
    return {site: Selection(update.delta, names) for site, update in members.items()}


class SiteScores:
    """Has the sites of a turn score models made of what they received and of a weighted sum of their updates.

    Args:
      channel: Carries the models and brings the scores.
      round_idx: 0-based round.
      payloads: What each site received whose update was taken: these sites evaluate.
      updates: Theirs, readable for as long as this is used.
    """

    def __init__(
        self,
        channel: Channel,
        round_idx: int,
        payloads: Mapping[str, Payload],
        updates: Mapping[str, Update],
    ) -> None:
        self._channel = channel
        self._round_idx = round_idx
        self._payloads = payloads
        self._updates = updates

    @property
    def sites(self) -> list[str]:
        """Who plays and evaluates, sorted."""
        return sorted(self._payloads)

    def utility(self, coalition: frozenset[str]) -> float:
        """U(S): mean score, over all sites of the turn, of received + Σ_S p_j d_j / Σ_S p_j with p by cases.

        Per tensor over the coalition's sites that sent it; a tensor that none of them sent stays as received. The empty
        coalition's model is the received one.

        Raises:
          ScoringError: If a site does not give its score.
        """
        members = {site: self._updates[site] for site in coalition}
        cases = {site: float(update.num_cases) for site, update in members.items()}
        mean = weighted_mean(members, cases) if members else {}
        answers = self._ask(dict.fromkeys(self._payloads, mean))
        scores = [self._score(site, answer) for site, answer in sorted(answers.items())]
        return sum(scores) / len(scores)

    def cross_site(self) -> tuple[dict[str, dict[str, float | None]], dict[str, str]]:
        """Each site's model of the round, received + d_j, at itself and at every other site of the turn.

        A tensor that the evaluating site exchanges and the other did not send stays as the evaluating site received it.

        Returns:
          The scores and the heads of `Assessment`.
        """
        own = self._ask({site: self._updates[site].delta for site in self._payloads})
        outputs = {site: a.meta.get("outputs") for site, a in sorted(own.items()) if isinstance(a, Message)}
        scores: dict[str, dict[str, float | None]] = {}
        for model_of in sorted(self._payloads):
            at = [s for s in outputs if s != model_of and model_of in outputs and _fits(outputs[model_of], outputs[s])]
            answers = self._ask(dict.fromkeys(at, self._updates[model_of].delta)) | {model_of: own[model_of]}
            scores[model_of] = {
                site: self._score_or_none(site, answers[site]) if site in answers else None for site in sorted(own)
            }
        return scores, {site: "own" if out is None else "received" for site, out in outputs.items()}

    def _ask(self, changes: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Message | Failure]:
        """Send each site what it received, changed by what of this it exchanges."""
        made: dict[int, tuple[Tensor, Tensor]] = {}

        def changed(received: Tensor, change: Tensor) -> Tensor:
            # Sites that received one tensor get one sum, not a copy each.
            before, total = made.get(id(received), (None, None))
            if total is None or before is not change:
                total = received + change
                made[id(received)] = (change, total)
            return total

        requests = {}
        for site, change in changes.items():
            payload = self._payloads[site]
            if payload.rows:
                raise ScoringError(f"site {site!r}: exchanges rows of its own, so no model fits all sites of the turn")
            tensors = {n: changed(t, change[n]) if n in change else t for n, t in payload.tensors.items()}
            requests[site] = Message({"round": self._round_idx}, tensors, payload.extras)
        return self._channel.exchange(Task.EVALUATE, requests) if requests else {}

    def _score(self, site: str, answer: Message | Failure) -> float:
        """The score in an answer.

        Raises:
          ScoringError: If there is none, it is of another round, or it is not in [0, 1].
        """
        if isinstance(answer, Failure):
            raise ScoringError(f"site {site!r}: {answer.reason}")
        score, round_idx = answer.meta.get("score"), answer.meta.get("round")
        if round_idx != self._round_idx or not (is_number(score) and 0 <= score <= 1):
            raise ScoringError(
                f"site {site!r}: score {score!r} of round {round_idx!r}, expected a number in [0, 1] of round "
                f"{self._round_idx}"
            )
        return float(score)

    def _score_or_none(self, site: str, answer: Message | Failure) -> float | None:
        try:
            return self._score(site, answer)
        except ScoringError as error:
            logger.warning("cross-site evaluation: %s", error)
            return None


def _fits(model: Any, site: Any) -> bool:
    """Whether a site can score another's outputs: with output layers of its own, or if they mean the same."""
    return site is None or model == site


def play_turn(scores: SiteScores, config: ContributionConfig, seed: int) -> Game | None:
    """The turn's game; None, with a warning, if a site gave no score: without it the values mean nothing."""
    tolerances = {key: getattr(config, key) for key in ("between_rounds", "within_permutation", "convergence")}
    try:
        return play(scores.sites, scores.utility, config.tier, np.random.default_rng(seed), **tolerances)
    except ScoringError as error:
        logger.warning("no contribution values in this round: %s", error)
        return None
