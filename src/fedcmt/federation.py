"""The federation, given any way to exchange messages with sites: plan, prepare, rounds, finish.

The same object runs under FLARE (`fedcmt.flare.server`) and in one process (`fedcmt.inprocess`); it knows neither
FLARE nor nnU-Net.
"""

import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedcmt.algorithms.base import Algorithm, Participant, State, Update
from fedcmt.answers import CheckedChannel, read_introduction, read_participant, read_report, read_update
from fedcmt.config import ServerConfig
from fedcmt.evaluation.contribution import MOST_EXACT, add_round, summarise
from fedcmt.fixed_settings import check_settings, fix_settings, new_federation
from fedcmt.influence import FEWEST_SITES, influence_factors, scale_updates
from fedcmt.json_file import read_state, write_state
from fedcmt.messages import Channel, Failure, Message, Task
from fedcmt.models.scopes import ScopeRules
from fedcmt.models.sequences import SEQUENCES
from fedcmt.params import ParameterError, Params, Tensors, check_shapes
from fedcmt.privacy.ledger import BudgetExceeded
from fedcmt.privacy.server_half import ServerPrivacy, check_update
from fedcmt.randomness import derive_seed
from fedcmt.scoring import Assessment, SiteScores, play_turn
from fedcmt.server_state import Participation, Progress, StateFiles
from fedcmt.uploads import SpooledUpdates
from fedcmt.wire import decode

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class FederationError(RuntimeError):
    """The job cannot go on; the message names the sites and what to look at."""


class Planner(Protocol):
    """The server's planning, without images: `fedcmt.nnunet.planner.FederatedPlanner`."""

    def plan(self, fingerprints: Mapping[str, dict], known: Mapping[str, dict]) -> dict[str, dict]:
        """Site to the plans it is to install: known ones stay, and further sites get the same architecture."""
        ...

    def initial(
        self,
        plans: Mapping[str, dict],
        fingerprints: Mapping[str, dict],
        modalities: Mapping[str, str],
        rules: ScopeRules,
    ) -> Params:
        """Initial values of every wire tensor, seeded."""
        ...


@dataclass
class _Round:
    """What became of a round, over all its turns.

    Attributes:
      asked: Sites that were to train.
      updates: Those that made it, without their tensors.
      failures: Site to why its update did not.
      factors: Site to what its update was scaled by, where ``max_norm_ratio`` bounds influence.
      assessment: What the updates are worth.
    """

    asked: list[str] = field(default_factory=list)
    updates: dict[str, Update] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    assessment: Assessment = field(default_factory=Assessment)


class Federation:
    """One job's server half.

    Args:
      algorithm: What is shared, and how updates are combined.
      planner: Merges fingerprints and decides the common architecture.
      config: Rounds, planning options, minimum of sites, seed.
      job: The job's name.
      folder: Where the server keeps its state; one file per kind, replaced atomically each round.
      resume: Continue after the last round in ``folder`` instead of starting anew.
      on_round: Called after each round with its 0-based index and curves (mean metrics, what the algorithm logs), e.g.
        for TensorBoard.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        planner: Planner,
        config: ServerConfig,
        *,
        job: str,
        folder: Path,
        resume: bool = False,
        on_round: Callable[[int, Mapping[str, float]], None] = lambda round_idx, metrics: None,
    ) -> None:
        self._algorithm = algorithm
        self._planner = planner
        self._config = config
        self._job = job
        self._folder = folder
        self._resume = resume
        self._on_round = on_round
        self._federation: str
        self._stored: StateFiles
        self._privacy: ServerPrivacy

    def run(self, channel: Channel, sites: Sequence[str]) -> dict[str, Any]:
        """Run the whole job and return its results: what the final table shows.

        Raises:
          ConfigError: If it is to go on with other settings than it began with.
          FederationError: If a site cannot be prepared, or too few sites answer in a round.
        """
        started = time.monotonic()
        channel, sites = CheckedChannel(channel), sorted(sites)
        check_scoring(self._algorithm, self._config, sites)
        check_influence(self._algorithm, self._config, sites)
        self._federation = (
            check_settings(self._folder, self._config, self._algorithm) if self._resume else new_federation()
        )
        self._stored = StateFiles(self._folder, self._job, self._federation)
        stored = self._stored.load() if self._resume else None
        if stored is not None and stored[1].round >= self._config.num_rounds:
            raise FederationError(
                f"--resume: this run has finished {stored[1].round + 1} rounds, not {self._config.num_rounds} or fewer"
            )
        self._open_ledger(stored, len(sites))
        participants, state, progress = self._begin(channel, sites, stored)
        state, progress, stopped = self._train(channel, state, progress, participants)
        reports, failed = self._finish(channel, state, participants)
        return {
            "job": self._job,
            "seed": self._config.seed,
            "rounds": progress.round + 1,
            "seconds": round(time.monotonic() - started, 1),
            "best_round": progress.best[1],
            "sites": reports,
            "failed": failed,
            "participation": progress.participation,
            "contribution": summarise(progress.contribution),
            **progress.crossed,
            **({"privacy": told} if (told := self._privacy.summary(stopped)) else {}),
        }

    def _open_ledger(self, stored: tuple[State, Progress] | None, num_sites: int) -> None:
        """Take up the privacy of the job, before anything is asked of a site.

        Raises:
          FederationError: If the job's privacy terms alone allow no round.
        """
        self._privacy = ServerPrivacy(
            self._config.privacy,
            self._algorithm,
            self._folder,
            seed=self._config.seed,
            num_sites=num_sites,
            rounds_done=0 if stored is None else stored[1].round + 1,
        )
        if stored is None:
            try:
                self._privacy.check_budget()
            except BudgetExceeded as refusal:
                raise _no_round(refusal) from refusal

    def _begin(
        self, channel: Channel, sites: Sequence[str], stored: tuple[State, Progress] | None
    ) -> tuple[list[Participant], State, Progress]:
        """Plan, have the sites prepare, and see what to go on from."""
        self._privacy.note("planning statistics", "counts and moments of images; see docs/privacy.md")
        requests = {site: self._introduction(len(sites)) for site in sites}
        introductions = self._ask_all(channel, Task.FINGERPRINT, requests, lambda site, a: read_introduction(a))
        fingerprints = {site: fingerprint for site, (fingerprint, _) in introductions.items()}
        plans = self._plan(fingerprints, () if stored is None else stored[1].members())
        # A run that is resumed for longer keeps its schedules, or it would not be the same run.
        schedule_rounds = self._config.schedule_rounds or self._config.num_rounds
        progress = Progress(schedule_rounds) if stored is None else stored[1]
        participants = self._prepare(channel, plans, introductions, progress.schedule_rounds)
        initial = partial(self._initial, plans, fingerprints)
        if stored is None:
            state = self._algorithm.init(initial(participants), participants, progress.schedule_rounds)
        else:
            state = self._resumed(*stored, participants, initial)
        for site in participants:
            held = {name: state.params[name] for name in site.wire_shapes if name in state.params}
            where = f"site {site.name!r} against the server's initial model"
            check_shapes(held, dict(site.wire_shapes), where=where)
        return participants, state, progress.taken_up_by(sites)

    def _train(
        self, channel: Channel, state: State, progress: Progress, participants: Sequence[Participant]
    ) -> tuple[State, Progress, str | None]:
        """All rounds that are left: the state and progress after them, and why they ended early if they did."""
        for round_idx in range(progress.round + 1, self._config.num_rounds):
            received = state
            try:
                state, done = self._round(channel, round_idx, received, participants)
            except BudgetExceeded as refusal:
                return received, progress, self._stop_early(round_idx, refusal)
            best = self._keep_best(progress.best, round_idx, received, done.updates, len(participants))
            progress = replace(
                progress,
                round=round_idx,
                best=best,
                contribution=add_round(progress.contribution, done.assessment.sites),
                crossed=done.assessment.crossed(),
                participation=_add_participation(progress.participation, round_idx, done),
            )
            self._stored.keep(state, progress)
            self._report_round(round_idx, state, done)
        return state, progress, None

    def _introduction(self, num_sites: int) -> Message:
        meta = {"job": self._job, "seed": self._config.seed, "planning": self._config.planning}
        meta |= {"privacy": self._config.privacy.to_dict(), "num_sites": num_sites, "federation": self._federation}
        return Message({**meta, "continues": self._config.continues})

    def _stop_early(self, round_idx: int, refusal: BudgetExceeded) -> str:
        """End training before a round that the privacy budget does not allow, and keep what there is.

        Raises:
          FederationError: If no round could be afforded at all.
        """
        if round_idx == 0:
            raise _no_round(refusal) from refusal
        logger.warning("training ends after round %d of %d: %s", round_idx, self._config.num_rounds, refusal)
        return str(refusal)

    def _plan(self, fingerprints: Mapping[str, dict], members: Collection[str]) -> dict[str, dict]:
        """Plans of every site; those of the members of a run that is resumed stay, whoever has joined or left.

        A site whose joining came to nothing has plans in the file too, but is no member: they may be of other data.
        """
        path = self._folder / "plans.json"
        stored = read_state(path, needs=members) if members else {}
        plans = self._planner.plan(fingerprints, {site: stored[site] for site in stored if site in members})
        if not self._resume:
            fix_settings(self._folder, self._config, self._algorithm, self._federation)
        write_state(path, plans)
        return plans

    def _prepare(
        self,
        channel: Channel,
        plans: Mapping[str, dict],
        introductions: Mapping[str, tuple[dict, str]],
        schedule_rounds: int,
    ) -> list[Participant]:
        """Have the sites that introduced themselves prepare; sorted by name."""
        meta = {"num_rounds": self._config.num_rounds, "schedule_rounds": schedule_rounds, "resume": self._resume}
        requests = {site: Message({"plans": plans[site], **meta}) for site in introductions}
        self._privacy.note("case counts", "number of training cases of each site")

        def read(site: str, answer: Message) -> tuple[Participant, Any]:
            fingerprint, modality = introductions[site]
            return read_participant(site, modality, fingerprint, answer), answer.meta.get("sampling")

        prepared = self._ask_all(channel, Task.PREPARE, requests, read)
        for participant, sampling in prepared.values():
            self._privacy.admit(participant, sampling)
        participants = [participant for participant, _ in prepared.values()]
        _warn_of_lonely_channels(participants)
        return participants

    def _initial(
        self, plans: Mapping[str, dict], fingerprints: Mapping[str, dict], sites: Sequence[Participant]
    ) -> Params:
        """Initial values of every tensor that these sites exchange."""
        names = {site.name: site.modality for site in sites}
        return self._planner.initial({name: plans[name] for name in names}, fingerprints, names, self._algorithm.scopes)

    def _resumed(
        self,
        state: State,
        progress: Progress,
        participants: Sequence[Participant],
        initial: Callable[[Sequence[Participant]], Params],
    ) -> State:
        """The stored state, with the sites registered that were not in its last round."""
        first_round = progress.round + 1
        logger.info("resuming after round %d of %d", first_round, self._config.num_rounds)
        for site in participants:
            if site.name not in progress.sites:
                state = self._algorithm.register(state, site, initial([site]))
                logger.info("site %s joins after round %d", site.name, first_round)
                if first_round == self._config.num_rounds:
                    logger.warning("no round is left for %s to train in; go on with --resume --rounds N", site.name)
        if left := sorted(set(progress.sites) - {site.name for site in participants}):
            logger.info("without sites %s, which took part before", left)
        for name in left:
            state = self._algorithm.leave(state, name)
        return state

    def _round(
        self, channel: Channel, round_idx: int, state: State, participants: Sequence[Participant]
    ) -> tuple[State, _Round]:
        """All turns of a round: the state after it, and what became of it."""
        done = _Round()
        self._privacy.open_round(round_idx, participants)
        if self._config.privacy.release_metrics:
            self._privacy.note("round metrics", "each site's loss and validation scores", round_idx)
        turns = self._algorithm.turns(round_idx, participants)
        to_come = sum(len(turn) for turn in turns)
        least = min(self._least(participants), to_come)
        for turn in turns:
            if len(done.updates) + to_come < least:
                break  # a turn that cannot save the round is not trained
            state = self._play(channel, round_idx, state, turn, done)
            to_come -= len(turn)
        if len(done.updates) < least:
            raise FederationError(
                f"round {round_idx + 1}: {len(done.updates)} of {len(done.asked)} sites sent a usable update, "
                f"at least {least} are needed. {_describe(done.failures)}"
            )
        self._log_round(round_idx, done)
        return state, done

    def _play(self, channel: Channel, round_idx: int, state: State, turn: Sequence[Participant], done: _Round) -> State:
        """One turn: the state after it; what became of it is added to the round."""
        done.asked += [site.name for site in turn]
        folder = self._folder
        # On disk, so that memory does not grow with the number of sites.
        with (
            SpooledUpdates(folder / "uploads") as spool,
            SpooledUpdates(folder / "bounded") as bounded,
            SpooledUpdates(folder / "noisy") as noisy,
        ):
            updates, failures, frozen = self._turn(channel, round_idx, state, turn, spool)
            done.failures |= failures
            if not updates:
                return state
            updates = self._bounded(updates, round_idx, bounded.add, done.factors)
            protected = self._privacy.protect(updates, turn, frozen, round_idx, noisy.add)
            received, state = state, self._algorithm.aggregate(state, protected)
            self._assess(channel, round_idx, received, turn, updates, done.assessment)
            done.updates |= {site: replace(update, delta={}, extras={}) for site, update in updates.items()}
        return state

    def _bounded(
        self,
        updates: Mapping[str, Update],
        round_idx: int,
        keep: Callable[[str, Tensors], Tensors],
        found: dict[str, float],
    ) -> dict[str, Update]:
        """A turn's updates within ``max_norm_ratio``, if there is one; the factors are added to those ``found``."""
        if self._config.max_norm_ratio is None:
            return dict(updates)
        factors = influence_factors(updates, self._config.max_norm_ratio)
        for site, factor in factors.items():
            if factor < 1:
                logger.warning("round %d: update of site %r is oversized, scaled by %.4g", round_idx + 1, site, factor)
        found |= factors
        return scale_updates(updates, factors, keep)

    def _assess(
        self,
        channel: Channel,
        round_idx: int,
        received: State,
        turn: Sequence[Participant],
        updates: Mapping[str, Update],
        assessment: Assessment,
    ) -> None:
        """Add what a turn's updates say, while they can be read; nothing where single updates are to be covered."""
        if self._config.privacy.clips_updates:
            return
        assessment.add_directions(updates)
        config = self._config.contribution
        plays = config.tier > 0 and (round_idx + 1) % config.every == 0
        crosses = self._config.cross_site and round_idx == self._config.num_rounds - 1
        if not (plays or crosses):
            return
        payloads = {site.name: self._algorithm.payload(received, site) for site in turn if site.name in updates}
        scores = SiteScores(channel, round_idx, payloads, updates)
        if plays:
            seed = derive_seed(self._config.seed, "contribution", round_idx)
            assessment.add_game(play_turn(scores, config, seed))
        if crosses:
            assessment.add_cross_site(*scores.cross_site())

    def _turn(
        self, channel: Channel, round_idx: int, state: State, turn: Sequence[Participant], spool: SpooledUpdates
    ) -> tuple[dict[str, Update], dict[str, str], dict[str, frozenset[str]]]:
        """Usable updates, why the others are not, and what each site was asked to leave out."""

        def keep(site: str, answer: Message) -> Message:
            tensors = decode(answer.tensors, dtype, where=f"update of site {site!r}")
            return replace(answer, tensors=spool.add(site, tensors))

        dtype = self._config.update_dtype
        requests, frozen = {}, {}
        for site in turn:
            payload = self._algorithm.payload(state, site)
            meta = {"round": round_idx, "frozen": sorted(payload.frozen), "rows": _listed(payload.rows)}
            meta["update_dtype"] = dtype
            requests[site.name] = Message(meta, payload.tensors, payload.extras)
            frozen[site.name] = payload.frozen
        answers = channel.exchange(Task.TRAIN, requests, keep)
        updates: dict[str, Update] = {}
        failures: dict[str, str] = {}
        for site in turn:
            answer = answers[site.name]
            if isinstance(answer, Failure):
                failures[site.name] = answer.reason
                continue
            try:
                update = read_update(answer, site, requests[site.name], takes_extras=self._algorithm.sends_extras)
                updates[site.name] = check_update(self._privacy, site.name, update)
            except ParameterError as error:
                failures[site.name] = str(error)
                logger.warning("round %d: %s; its update is left out", round_idx + 1, error)
        return updates, failures, frozen

    def _finish(
        self, channel: Channel, state: State, participants: Sequence[Participant]
    ) -> tuple[dict[str, dict], dict[str, str]]:
        """Reports of the sites that finished, and why the others did not."""
        requests = {}
        for site in participants:
            payload = self._algorithm.payload(state, site) if self._algorithm.product == "received" else None
            requests[site.name] = (
                Message({"rows": _listed(payload.rows)}, payload.tensors, payload.extras) if payload else Message({})
            )
        self._privacy.note("test scores", "means over each site's test cases and whole validation cases")
        answers = channel.exchange(Task.FINISH, requests)
        reports, failed = _read_all(answers, lambda site, answer: read_report(answer))
        if len(reports) < self._least(participants):
            raise FederationError(f"task 'finish' failed; the models of the last round are kept. {_describe(failed)}")
        return reports, failed

    def _least(self, participants: Sequence[Participant]) -> int:
        return len(participants) if self._config.min_sites is None else self._config.min_sites

    def _ask_all(
        self, channel: Channel, task: Task, requests: Mapping[str, Message], read: Callable[[str, Message], _T]
    ) -> dict[str, _T]:
        """Exchange outside rounds, where every site is needed; sorted by site."""
        found, failures = _read_all(channel.exchange(task, requests), read)
        if failures:
            raise FederationError(f"task {task.value!r} failed. {_describe(failures)}")
        return found

    def _keep_best(
        self,
        best: tuple[float, int | None],
        round_idx: int,
        state: State,
        updates: Mapping[str, Update],
        num_sites: int,
    ) -> tuple[float, int | None]:
        """Keep the state that was *received* this round if its mean validation score over sites is the best yet.

        The score is Dice where a site segments and accuracy where it classifies, both in [0, 1]. A round without the
        score of every site of the job does not count: means over other sites do not compare.
        """
        scores = [_received_score(update) for update in updates.values()]
        known = [score for score in scores if score is not None]
        if len(known) < num_sites or sum(known) / len(known) <= best[0]:
            return best
        best = sum(known) / len(known), round_idx
        self._stored.keep_best(state, *best)
        return best

    def _report_round(self, round_idx: int, state: State, done: _Round) -> None:
        """Curves to whoever watches, and a line for machines in ``rounds.jsonl``."""
        curves, assessment = state.record.get("curves", {}), done.assessment
        row = {"round": round_idx, "sites": {s: dict(u.metrics) for s, u in done.updates.items()}, "server": curves}
        row |= {"contribution": assessment.sites, "cosines": assessment.cosines, "games": assessment.games}
        row |= {"absent": done.failures, "influence": done.factors}
        with (self._folder / "rounds.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        means = {f"mean_{name}": value for name, value in _mean_metrics(done.updates).items()}
        factors = {f"influence/{site}": factor for site, factor in done.factors.items()}
        self._on_round(round_idx, {**means, **factors, **assessment.curves(), **curves})

    def _log_round(self, round_idx: int, done: _Round) -> None:
        """Who took part with what, and who did not and why."""
        means = _mean_metrics(done.updates)
        values = ", ".join(f"{name} {value:.4f}" for name, value in sorted(means.items()))
        logger.info(
            "round %d/%d aggregated from %d sites (%s): %s%s",
            round_idx + 1,
            self._config.num_rounds,
            len(done.updates),
            ", ".join(sorted(done.updates)),
            values,
            f"; without {sorted(done.failures)}. {_describe(done.failures)}" if done.failures else "",
        )


def check_scoring(algorithm: Algorithm, config: ServerConfig, sites: Collection[str]) -> None:
    """Refuse, before anything is asked of a site, to score what cannot be.

    Raises:
      FederationError: If there are too many coalitions, the sites exchange nothing, or scores of single sites' models
        would escape the job's privacy.
    """
    tier = config.contribution.tier
    if tier == 2 and len(sites) > MOST_EXACT:
        raise FederationError(
            f"server.contribution: tier 2 scores 2^{len(sites)} models a round, at most {MOST_EXACT} sites are taken; "
            "use tier 3"
        )
    if (tier > 0 or config.cross_site) and config.privacy.formal:
        raise FederationError(
            f"server.contribution and server.cross_site score single sites' models, which {config.privacy.mode} does "
            "not cover. Leave them out, or run without server.privacy."
        )
    if (tier > 0 or config.cross_site) and algorithm.scopes.keep_everything:
        name = type(algorithm).__name__
        raise FederationError(f"server.contribution and server.cross_site: {name} exchanges nothing to score")


def check_influence(algorithm: Algorithm, config: ServerConfig, sites: Collection[str]) -> None:
    """Refuse, before anything is asked of a site, to bound what cannot be.

    Raises:
      FederationError: If too few sites take part for a median, they exchange nothing, or the job's privacy counts on
        updates that do not depend on each other.
    """
    if config.max_norm_ratio is None:
        return
    where = f"server.max_norm_ratio is {config.max_norm_ratio:g}"
    if len(sites) < FEWEST_SITES:
        raise FederationError(
            f"{where}, and the job has {len(sites)} sites; with fewer than {FEWEST_SITES} none has others to be "
            "measured by"
        )
    if config.privacy.clips_updates:
        raise FederationError(
            f"{where}, and so what one site sends would change how others' updates are scaled, which the guarantee of "
            f"{config.privacy.mode} excludes. Leave it out: server.privacy.clip bounds every update already."
        )
    if algorithm.scopes.keep_everything:
        raise FederationError(f"{where}, and {type(algorithm).__name__} exchanges nothing to bound")


def _no_round(refusal: BudgetExceeded) -> FederationError:
    return FederationError(f"privacy: the budget does not allow a single round: {refusal}")


def _listed(rows: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """As a message's plain values."""
    return {name: list(chosen) for name, chosen in rows.items()}


def _warn_of_lonely_channels(participants: Sequence[Participant]) -> None:
    """Say which channels only one of several sites of a modality has: a new sequence, or a misspelt name.

    A fusion site has every sequence: what it shares with one other site is spelt right. Where sequences go by one name,
    whatever a site calls them, a site's tensors say which it has, and other names are none.
    """
    for modality in sorted({p.modality for p in participants}):
        everyone = [p for p in participants if p.modality == modality and not _names_sequences(p)]
        sites = [p for p in everyone if p.role == "site"]
        for channel in sorted({channel for p in sites for channel in p.channels}):
            owners = [p.name for p in everyone if channel in p.channels]
            if len(sites) > 1 and len(owners) == 1:
                logger.warning("only site %s has %s channel %r; misspelt?", owners[0], modality, channel)


def _names_sequences(site: Participant) -> bool:
    """Whether the site's channels are known by the names of its tensors, as an encoder for each sequence has them."""
    return any(name.startswith(f"encoders.{sequence}.") for name in site.wire_shapes for sequence in SEQUENCES)


def _read_all(
    answers: Mapping[str, Message | Failure], read: Callable[[str, Message], _T]
) -> tuple[dict[str, _T], dict[str, str]]:
    """What could be read of the answers, sorted by site, and why the others could not."""
    found: dict[str, _T] = {}
    failures: dict[str, str] = {}
    for site, answer in sorted(answers.items()):
        if isinstance(answer, Failure):
            failures[site] = answer.reason
            continue
        try:
            found[site] = read(site, answer)
        except ParameterError as error:
            failures[site] = str(error)
    return found, failures


def _add_participation(so_far: Participation, round_idx: int, done: _Round) -> Participation:
    """With one round more."""
    new = {site: {**entry, "absent": dict(entry["absent"])} for site, entry in so_far.items()}
    for site in done.asked:
        entry = new.setdefault(site, {"asked": 0, "took_part": 0, "absent": {}})
        entry["asked"] += 1
        entry["took_part"] += site in done.updates
        if site in done.failures:
            entry["absent"][str(round_idx + 1)] = done.failures[site]
    return new


def _received_score(update: Update) -> float | None:
    """A site's validation score of the model it received; None in rounds without validation."""
    return next((v for n, v in update.metrics.items() if n.startswith("val_") and n.endswith("_received")), None)


def _mean_metrics(updates: Mapping[str, Update]) -> dict[str, float]:
    """Mean over sites of each metric that every site sent."""
    if not updates:
        return {}
    common = set.intersection(*(set(update.metrics) for update in updates.values()))
    return {name: sum(u.metrics[name] for u in updates.values()) / len(updates) for name in common}


def _describe(failures: Mapping[str, str]) -> str:
    return "; ".join(f"Site {site!r}: {reason}" for site, reason in sorted(failures.items()))
