"""The federation, given any way to exchange messages with sites: plan, prepare, rounds, finish.

The same object runs under FLARE (`fedcmt.flare.server`) and in one process (`fedcmt.inprocess`); it knows neither
FLARE nor nnU-Net.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from fedcmt.algorithms.base import Algorithm, Participant, State, Update
from fedcmt.config import ServerConfig
from fedcmt.evaluation.contribution import MOST_EXACT, add_round, summarise
from fedcmt.json_file import read_json, write_json
from fedcmt.messages import Channel, Failure, Message, Task
from fedcmt.models.scopes import ScopeRules
from fedcmt.params import ParameterError, Params, check_finite, check_shapes, load_tensors, save_tensors, shapes
from fedcmt.privacy.ledger import BudgetExceeded
from fedcmt.privacy.server_half import ServerPrivacy, check_update
from fedcmt.randomness import derive_seed
from fedcmt.scoring import Assessment, SiteScores, play_turn
from fedcmt.settings import is_int
from fedcmt.uploads import SpooledUpdates

logger = logging.getLogger(__name__)

_MOST_CASES = 10**7
_LARGEST_CHANGE = 1e6
"""Of one weight in one round; weights are of the order of 1, and squares of much larger numbers overflow float32."""


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
        self._privacy: ServerPrivacy

    def run(self, channel: Channel, sites: Sequence[str]) -> dict[str, Any]:
        """Run the whole job and return its results: what the final table shows.

        Raises:
          FederationError: If a site cannot be prepared, or too few sites answer in a round.
        """
        started = time.monotonic()
        sites = sorted(sites)
        check_scoring(self._algorithm, self._config, sites)
        stored = self._load_state("state") if self._resume else None
        self._privacy = ServerPrivacy(
            self._config.privacy,
            self._algorithm,
            self._folder,
            seed=self._config.seed,
            num_sites=len(sites),
            rounds_done=0 if stored is None else stored[1]["round"] + 1,
        )
        self._privacy.note("planning statistics", "counts and moments of images; see docs/privacy.md")
        introductions = self._ask_all(channel, Task.FINGERPRINT, {s: self._introduction(len(sites)) for s in sites})
        fingerprints = {s: answer.meta["fingerprint"] for s, answer in introductions.items()}
        modalities = {s: answer.meta["modality"] for s, answer in introductions.items()}
        plans = self._plan(fingerprints)
        schedule_rounds = self._schedule_rounds(stored)
        participants = self._prepare(channel, {site: plans[site] for site in sites}, modalities, schedule_rounds)
        state, first_round = self._first_state(stored, plans, fingerprints, participants, schedule_rounds)
        best = (-math.inf, None) if stored is None else tuple(stored[1]["best"])
        tally, crossed = ({}, {}) if stored is None else (stored[1]["contribution"], stored[1]["crossed"])
        stopped, rounds = None, self._config.num_rounds
        for round_idx in range(first_round, self._config.num_rounds):
            received = state
            try:
                state, updates, assessment = self._round(channel, round_idx, received, participants)
            except BudgetExceeded as refusal:
                stopped, rounds = self._stop_early(round_idx, refusal), round_idx
                break
            best = self._keep_best(best, round_idx, received, updates)
            meta = {"round": round_idx, "best": best, "sites": sites, "schedule_rounds": schedule_rounds}
            tally, crossed = add_round(tally, assessment.sites), assessment.crossed()
            self._save_state("state", state, {**meta, "contribution": tally, "crossed": crossed})
            self._report_round(round_idx, state, updates, assessment)
        reports, failed = self._finish(channel, state, participants)
        return {
            "job": self._job,
            "seed": self._config.seed,
            "rounds": rounds,
            "seconds": round(time.monotonic() - started, 1),
            "best_round": best[1],
            "sites": reports,
            "failed": failed,
            "contribution": summarise(tally),
            **crossed,
            **({"privacy": told} if (told := self._privacy.summary(stopped)) else {}),
        }

    def _introduction(self, num_sites: int) -> Message:
        meta = {"job": self._job, "seed": self._config.seed, "planning": self._config.planning}
        return Message({**meta, "privacy": self._config.privacy.to_dict(), "num_sites": num_sites})

    def _stop_early(self, round_idx: int, refusal: BudgetExceeded) -> str:
        """End training before a round that the privacy budget does not allow, and keep what there is.

        Raises:
          FederationError: If no round could be afforded at all.
        """
        if round_idx == 0:
            raise FederationError(f"privacy: the budget does not allow a single round: {refusal}") from refusal
        logger.warning("training ends after round %d of %d: %s", round_idx, self._config.num_rounds, refusal)
        return str(refusal)

    def _plan(self, fingerprints: Mapping[str, dict]) -> dict[str, dict]:
        """Plans of every site; those of a run that is resumed stay, whoever has joined or left."""
        path = self._folder / "plans.json"
        plans = self._planner.plan(fingerprints, read_json(path) if self._resume else {})
        write_json(path, plans)
        return plans

    def _schedule_rounds(self, stored: tuple[State, dict] | None) -> int:
        """Rounds the schedules are made for; those of a run that is resumed stay, or it would not be the same run."""
        if stored is not None:
            return stored[1]["schedule_rounds"]
        return self._config.schedule_rounds or self._config.num_rounds

    def _prepare(
        self, channel: Channel, plans: Mapping[str, dict], modalities: Mapping[str, str], schedule_rounds: int
    ) -> list[Participant]:
        rounds = {"num_rounds": self._config.num_rounds, "schedule_rounds": schedule_rounds}
        requests = {site: Message({"plans": plan, **rounds, "resume": self._resume}) for site, plan in plans.items()}
        self._privacy.note("case counts", "number of training cases of each site")
        answers = self._ask_all(channel, Task.PREPARE, requests)
        participants = [_read_participant(site, modalities[site], a) for site, a in sorted(answers.items())]
        for site in participants:
            self._privacy.admit(site, answers[site.name].meta.get("sampling"))
        _warn_of_lonely_channels(participants)
        return participants

    def _first_state(
        self,
        stored: tuple[State, dict] | None,
        plans: Mapping[str, dict],
        fingerprints: Mapping[str, dict],
        participants: Sequence[Participant],
        schedule_rounds: int,
    ) -> tuple[State, int]:
        """The state to go on from, checked against every site, and the index of the first round."""

        def initial(sites: Sequence[Participant]) -> Params:
            names = {site.name: site.modality for site in sites}
            return self._planner.initial(
                {name: plans[name] for name in names},
                {name: fingerprints[name] for name in names},
                names,
                self._algorithm.scopes,
            )

        if stored is None:
            first_round = 0
            state = self._algorithm.init(initial(participants), participants, schedule_rounds)
        else:
            state, first_round = self._resumed(*stored, participants, initial)
        for site in participants:
            held = {name: state.params[name] for name in site.wire_shapes if name in state.params}
            where = f"site {site.name!r} against the server's initial model"
            check_shapes(held, dict(site.wire_shapes), where=where)
        return state, first_round

    def _resumed(
        self,
        state: State,
        meta: Mapping[str, Any],
        participants: Sequence[Participant],
        initial: Callable[[Sequence[Participant]], Params],
    ) -> tuple[State, int]:
        """The stored state, with the sites registered that were not in its last round."""
        first_round = meta["round"] + 1
        if first_round > self._config.num_rounds:
            raise FederationError(
                f"--resume: this run has finished {first_round} rounds, not {self._config.num_rounds} or fewer"
            )
        logger.info("resuming after round %d of %d", first_round, self._config.num_rounds)
        for site in participants:
            if site.name not in meta["sites"]:
                state = self._algorithm.register(state, site, initial([site]))
                logger.info("site %s joins after round %d", site.name, first_round)
                if first_round == self._config.num_rounds:
                    logger.warning("no round is left for %s to train in; go on with --resume --rounds N", site.name)
        if left := sorted(set(meta["sites"]) - {site.name for site in participants}):
            logger.info("without sites %s, which took part before", left)
        return state, first_round

    def _round(
        self, channel: Channel, round_idx: int, state: State, participants: Sequence[Participant]
    ) -> tuple[State, dict[str, Update], Assessment]:
        """All turns of a round: the state after it, the updates that made it without their tensors, their worth."""
        all_updates: dict[str, Update] = {}
        all_failures: dict[str, str] = {}
        assessment = Assessment()
        self._privacy.open_round(round_idx, participants)
        if self._config.privacy.release_metrics:
            self._privacy.note("round metrics", "each site's loss and validation scores", round_idx)
        turns = self._algorithm.turns(round_idx, participants)
        for turn in turns:
            # On disk, so that memory does not grow with the number of sites.
            with SpooledUpdates(self._folder / "uploads") as spool, SpooledUpdates(self._folder / "noisy") as noisy:
                updates, failures, frozen = self._turn(channel, round_idx, state, turn, spool)
                if updates:
                    protected = self._privacy.protect(updates, turn, frozen, round_idx, noisy.add)
                    received, state = state, self._algorithm.aggregate(state, protected)
                    self._assess(channel, round_idx, received, turn, updates, assessment)
            all_updates.update({site: replace(update, delta={}, extras={}) for site, update in updates.items()})
            all_failures.update(failures)
        asked = [site for turn in turns for site in turn]
        least = min(self._least(participants), len(asked))
        if len(all_updates) < least:
            raise FederationError(
                f"round {round_idx + 1}: {len(all_updates)} of {len(asked)} sites sent a usable update, "
                f"at least {least} are needed. {_describe(all_failures)}"
            )
        self._log_round(round_idx, all_updates, all_failures)
        return state, all_updates, assessment

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
            return replace(answer, tensors=spool.add(site, answer.tensors))

        requests, frozen = {}, {}
        for site in turn:
            payload = self._algorithm.payload(state, site)
            meta = {"round": round_idx, "frozen": sorted(payload.frozen), "rows": _listed(payload.rows)}
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
                update = _read_update(answer, site, requests[site.name])
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
        answers = channel.exchange(Task.FINISH, requests)
        self._privacy.note("test scores", "means over each site's test cases and whole validation cases")
        failed = {site: a.reason for site, a in sorted(answers.items()) if isinstance(a, Failure)}
        if len(answers) - len(failed) < self._least(participants):
            raise FederationError(f"task 'finish' failed; the models of the last round are kept. {_describe(failed)}")
        return {s: a.meta["report"] for s, a in sorted(answers.items()) if isinstance(a, Message)}, failed

    def _least(self, participants: Sequence[Participant]) -> int:
        return len(participants) if self._config.min_sites is None else self._config.min_sites

    def _ask_all(self, channel: Channel, task: Task, requests: Mapping[str, Message]) -> dict[str, Message]:
        """Exchange outside rounds, where every site is needed."""
        answers = channel.exchange(task, requests)
        failures = {site: a.reason for site, a in answers.items() if isinstance(a, Failure)}
        if failures:
            raise FederationError(f"task {task.value!r} failed. {_describe(failures)}")
        return {site: a for site, a in answers.items() if isinstance(a, Message)}

    def _keep_best(
        self, best: tuple[float, int | None], round_idx: int, state: State, updates: Mapping[str, Update]
    ) -> tuple[float, int | None]:
        """Keep the state that was *received* this round if its mean validation score over sites is the best yet.

        The score is Dice where a site segments and accuracy where it classifies, both in [0, 1].
        """
        scores = [_received_score(update) for update in updates.values()]
        known = [score for score in scores if score is not None]
        if len(known) < len(scores) or not known or sum(known) / len(known) <= best[0]:
            return best
        best = sum(known) / len(known), round_idx
        self._save_state("best", state, {"round": round_idx, "best": best})
        return best

    def _save_state(self, stem: str, state: State, meta: Mapping[str, Any]) -> None:
        tensors = {f"params/{n}": t for n, t in state.params.items()} | {
            f"memory/{n}": t for n, t in state.memory.items()
        }
        save_tensors(self._folder / f"{stem}.safetensors", tensors, {**meta, "job": self._job, "record": state.record})

    def _load_state(self, stem: str) -> tuple[State, dict]:
        tensors, meta = load_tensors(self._folder / f"{stem}.safetensors")
        if meta["job"] != self._job:
            raise FederationError(f"{self._folder}: state of job {meta['job']!r}, not of {self._job!r}")
        parts = {
            kind: {n.removeprefix(kind + "/"): t for n, t in tensors.items() if n.startswith(kind + "/")}
            for kind in ("params", "memory")
        }
        return State(parts["params"], parts["memory"], meta["record"]), meta

    def _report_round(
        self, round_idx: int, state: State, updates: Mapping[str, Update], assessment: Assessment
    ) -> None:
        """Curves to whoever watches, and a line for machines in ``rounds.jsonl``."""
        curves = state.record.get("curves", {})
        row = {"round": round_idx, "sites": {s: dict(u.metrics) for s, u in updates.items()}, "server": curves}
        row |= {"contribution": assessment.sites, "cosines": assessment.cosines, "games": assessment.games}
        with (self._folder / "rounds.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        means = {f"mean_{name}": value for name, value in _mean_metrics(updates).items()}
        self._on_round(round_idx, {**means, **assessment.curves(), **curves})

    def _log_round(self, round_idx: int, updates: Mapping[str, Update], failures: Mapping[str, str]) -> None:
        means = _mean_metrics(updates)
        values = ", ".join(f"{name} {value:.4f}" for name, value in sorted(means.items()))
        without = f"; without {sorted(failures)}" if failures else ""
        logger.info(
            "round %d/%d aggregated from %d sites: %s%s",
            round_idx + 1,
            self._config.num_rounds,
            len(updates),
            values,
            without,
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


def _read_participant(site: str, modality: str, answer: Message) -> Participant:
    """What a prepared site says of itself.

    Raises:
      FederationError: If a value is missing or cannot be.
    """
    cases, channels, wire = (answer.meta.get(key) for key in ("num_cases", "channels", "wire_shapes"))
    if not (is_int(cases) and 1 <= cases < _MOST_CASES and isinstance(channels, list) and isinstance(wire, dict)):
        raise FederationError(
            f"site {site!r}: num_cases {cases!r}, channels {channels!r}, wire_shapes of type {type(wire).__name__}; "
            "expected a whole number from 1, a list and an object"
        )
    role = answer.meta.get("role", "site")
    if role not in ("site", "fusion"):
        raise FederationError(f"site {site!r}: role is {role!r}, expected site or fusion")
    return Participant(site, modality, tuple(channels), cases, {n: tuple(shape) for n, shape in wire.items()}, role)


def _listed(rows: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """As a message's plain values."""
    return {name: list(chosen) for name, chosen in rows.items()}


def _read_update(answer: Message, site: Participant, request: Message) -> Update:
    """The update in a site's answer to a request.

    Raises:
      ParameterError: If it is of another round, a tensor is missing, unknown, of another shape, not finite or too
        large, or all are zero.
    """
    where, round_idx = f"update of site {site.name!r}", request.meta["round"]
    if answer.meta.get("round") != round_idx:
        raise ParameterError(f"{where}: is of round {answer.meta.get('round')}, expected {round_idx}")
    steps, metrics = answer.meta.get("num_steps"), answer.meta.get("metrics")
    if not is_int(steps) or steps < 1:
        raise ParameterError(f"{where}: num_steps is {steps!r}, expected a whole number from 1")
    if not isinstance(metrics, dict) or not all(isinstance(v, float) and math.isfinite(v) for v in metrics.values()):
        raise ParameterError(f"{where}: metrics are {metrics!r}, expected finite numbers by name")
    if beyond := {name: value for name, value in metrics.items() if name.startswith("val_") and not 0 <= value <= 1}:
        raise ParameterError(f"{where}: validation scores {beyond} are not in [0, 1]")
    expected = {name: shape for name, shape in shapes(request.tensors).items() if name not in request.meta["frozen"]}
    check_shapes(answer.tensors, expected, where=where)
    _check_types(answer.tensors, request.tensors, where)
    check_finite(answer.tensors, where=where)
    _check_size(answer.tensors, where)
    check_finite(answer.extras, where=where)
    return Update(
        delta=answer.tensors,
        num_cases=site.num_cases,
        num_steps=steps,
        metrics=metrics,
        extras=answer.extras,
    )


def _check_types(delta: Params, received: Params, where: str) -> None:
    """Raise `ParameterError` if an update has other types than what it is an update of."""
    wrong = [f"{n} {t.dtype} instead of {received[n].dtype}" for n, t in delta.items() if t.dtype != received[n].dtype]
    if wrong:
        raise ParameterError(f"{where}: {len(wrong)} tensors have another type: {wrong[:4]}")


def _check_size(delta: Params, where: str) -> None:
    """Raise `ParameterError` if an update is zero or beyond anything that training does to weights."""
    largest = {name: float(tensor.abs().max()) for name, tensor in delta.items() if tensor.numel()}
    if largest and not any(largest.values()):
        raise ParameterError(f"{where}: is zero everywhere; the site has not trained")
    beyond = sorted(name for name, value in largest.items() if value > _LARGEST_CHANGE)
    if beyond:
        raise ParameterError(
            f"{where}: {beyond[0]} changes by {largest[beyond[0]]:.3g}, at most {_LARGEST_CHANGE:.0e} is taken"
        )


def _warn_of_lonely_channels(participants: Sequence[Participant]) -> None:
    """Say which channels only one of several sites of a modality has: a new sequence, or a misspelt name."""
    for modality in sorted({p.modality for p in participants}):
        sites = [p for p in participants if p.modality == modality]
        for channel in sorted({channel for p in sites for channel in p.channels}):
            names = [p.name for p in sites if channel in p.channels]
            if len(sites) > 1 and len(names) == 1:
                logger.warning("only site %s has %s channel %r; misspelt?", names[0], modality, channel)


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
