"""The federation's loop over plain Python sites that add a constant to what they receive."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fedcmt.algorithms.base import Algorithm, Participant, Payload, State, Update
from fedcmt.algorithms.fedavg import FedAvg, weighted_mean
from fedcmt.algorithms.fedcmt import FedCMT
from fedcmt.algorithms.fedmepd import FedMEPD
from fedcmt.algorithms.standalone import Standalone
from fedcmt.config import ConfigError, ContributionConfig, ServerConfig
from fedcmt.federation import Federation, FederationError, _warn_of_lonely_channels
from fedcmt.json_file import JsonFileError, read_json
from fedcmt.messages import Failure, Keep, Message, Task, as_it_is
from fedcmt.models.scopes import ScopeRules
from fedcmt.params import ParameterError, Params, load_tensors, take_rows
from fedcmt.privacy.ledger import LedgerError
from fedcmt.privacy.terms import PrivacyTerms

INITIAL = {"w": torch.tensor([[1.0, 2.0, 3.0]]), "g@mr": torch.tensor([10.0, 20.0]), "g@ct": torch.tensor([30.0, 40.0])}


@dataclass
class ConstantSite:
    """Adds `step` to every tensor it receives, and validates with the Dice it is told.

    A model it is to score has a tenth of the mean of `w`: of the initial model 0.2.
    """

    step: float
    cases: int
    modality: str = "MR"
    dice: list[float] = field(default_factory=list)
    outputs: dict[str, Any] | None = None

    @property
    def names(self) -> list[str]:
        return ["w", f"g@{self.modality.lower()}"]

    def handle(self, task: Task, message: Message) -> Message:
        if task is Task.FINGERPRINT:
            return Message({"fingerprint": {"cases": self.cases}, "modality": self.modality})
        if task is Task.PREPARE:
            wire = {name: list(INITIAL[name].shape) for name in self.names}
            return Message({"channels": ["c"], "num_cases": self.cases, "wire_shapes": wire})
        if task is Task.FINISH:
            return Message({"report": {"cases": self.cases}})
        round_idx = message.meta["round"]
        if task is Task.EVALUATE:
            score = float(message.tensors["w"].mean()) / 10
            return Message({"round": round_idx, "score": score, "outputs": self.outputs})
        metrics = {"val_dice_received": self.dice[round_idx]} if self.dice else {}
        trained = [name for name in message.tensors if name not in message.meta["frozen"]]
        delta = {name: torch.full_like(message.tensors[name], self.step) for name in trained}
        return Message({"round": round_idx, "num_steps": 1, "metrics": {"loss": self.step, **metrics}}, delta)


Tamper = Callable[[Message], Message | Failure]


def stamped(task: Task, site: str, answer: Message) -> Message:
    """The answer with what every site says of it."""
    return replace(answer, meta={**answer.meta, "task": task.value, "site": site})


@dataclass
class DirectChannel:
    """Hands messages over, remembers them, and changes the answers it is told to: (task, site, round) -> change."""

    sites: Mapping[str, ConstantSite]
    tampers: Mapping[tuple[Task, str, int | None], Tamper] = field(default_factory=dict)
    sent: list[tuple[Task, str, Message]] = field(default_factory=list)

    def exchange(
        self, task: Task, messages: Mapping[str, Message], keep: Keep = as_it_is
    ) -> dict[str, Message | Failure]:
        answers: dict[str, Message | Failure] = {}
        for site, message in messages.items():
            self.sent.append((task, site, message))
            answer = stamped(task, site, self.sites[site].handle(task, message))
            answer = self.tampers.get((task, site, message.meta.get("round")), lambda m: m)(answer)
            answers[site] = answer if isinstance(answer, Failure) else self._kept(keep, site, answer)
        return answers

    @staticmethod
    def _kept(keep: Keep, site: str, answer: Message) -> Message | Failure:
        try:
            return keep(site, answer)
        except ValueError:
            return Failure("unreadable answer")

    def of(self, task: Task, site: str) -> list[Message]:
        return [message for t, s, message in self.sent if (t, s) == (task, site)]


class GivenPlanner:
    """Plans nothing; the initial model is given. Remembers for which sites one was wanted."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def plan(self, fingerprints: Mapping[str, dict], known: Mapping[str, dict]) -> dict[str, dict]:
        return {site: {"for": site, **fingerprint} for site, fingerprint in fingerprints.items()} | dict(known)

    def initial(
        self,
        plans: Mapping[str, dict],
        fingerprints: Mapping[str, dict],
        modalities: Mapping[str, str],
        rules: ScopeRules,
    ) -> Params:
        self.asked.append(sorted(plans))
        names = {"w", *(f"g@{modality.lower()}" for modality in modalities.values())}
        return {name: tensor.clone() for name, tensor in INITIAL.items() if name in names}


class Momentum(FedAvg):
    """FedAvg with something to remember: v <- 0.5 v + mean, params + v, and how often."""

    def init(self, initial: Params, sites: object, num_rounds: int) -> State:
        return State(dict(initial), {n: torch.zeros_like(t) for n, t in initial.items()}, {"aggregated": 0})

    def aggregate(self, state: State, updates: Mapping[str, Update]) -> State:
        mean = weighted_mean(updates, dict.fromkeys(updates, 1.0))
        velocity = {n: 0.5 * v + mean.get(n, 0.0) for n, v in state.memory.items()}
        params = {n: t + velocity[n] for n, t in state.params.items()}
        return State(params, velocity, {"aggregated": state.record["aggregated"] + 1})


class OneByOne(FedAvg):
    """Every site is a turn of its own."""

    def turns(self, round_idx: int, sites: object) -> list[list[Participant]]:
        return [[site] for site in sites]  # type: ignore[attr-defined]


def three_sites() -> dict[str, ConstantSite]:
    # Weights 1, 3 and 4: the mean step is (1 * 1 + 3 * 2 + 4 * 4) / 8 = 23 / 8; without c it is 7 / 4.
    return {"a": ConstantSite(1.0, 1), "b": ConstantSite(2.0, 3), "c": ConstantSite(4.0, 4, modality="CT")}


def run(
    folder: Path,
    channel: DirectChannel,
    algorithm: Algorithm | None = None,
    *,
    rounds: int = 1,
    min_sites: int | None = None,
    job: str = "tiny",
    resume: bool = False,
    planner: GivenPlanner | None = None,
    schedule_rounds: int | None = None,
    contribution: ContributionConfig | None = None,
    cross_site: bool = False,
    privacy: PrivacyTerms | None = None,
    max_norm_ratio: float | None = None,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    config = ServerConfig(
        num_rounds=rounds,
        min_sites=min_sites,
        seed=3,
        schedule_rounds=schedule_rounds,
        contribution=contribution or ContributionConfig(),
        cross_site=cross_site,
        privacy=privacy or PrivacyTerms(),
        max_norm_ratio=max_norm_ratio,
    )
    config = replace(config, **(settings or {}))
    federation = Federation(
        algorithm or FedAvg(), planner or GivenPlanner(), config, job=job, folder=folder, resume=resume, **more
    )
    return federation.run(channel, list(reversed(channel.sites)))


def stored(folder: Path, kind: str = "state") -> dict[str, Tensor]:
    tensors, _ = load_tensors(folder / f"{kind}.safetensors")
    return {n.removeprefix("params/"): t for n, t in tensors.items() if n.startswith("params/")}


def test_each_site_receives_its_own_tensors_only(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites())
    run(tmp_path, channel)
    payloads = {site: channel.of(Task.TRAIN, site)[0].tensors for site in "abc"}
    assert {site: sorted(p) for site, p in payloads.items()} == {
        "a": ["g@mr", "w"],
        "b": ["g@mr", "w"],
        "c": ["g@ct", "w"],
    }
    assert payloads["c"]["g@ct"].tolist() == [30.0, 40.0]


def test_each_site_gets_its_own_plans(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites())
    run(tmp_path, channel, rounds=2)
    meta = channel.of(Task.PREPARE, "b")[0].meta
    assert meta == {"plans": {"for": "b", "cases": 3}, "num_rounds": 2, "schedule_rounds": 2, "resume": False}


def test_deltas_are_aggregated_by_cases(tmp_path: Path) -> None:
    run(tmp_path, DirectChannel(three_sites()))
    state = stored(tmp_path)
    assert state["w"].tolist() == [[1 + 23 / 8, 2 + 23 / 8, 3 + 23 / 8]]
    assert state["g@mr"].tolist() == [10 + 7 / 4, 20 + 7 / 4]  # (1 * 1 + 3 * 2) / 4
    assert state["g@ct"].tolist() == [34.0, 44.0]  # c alone


def test_the_next_round_starts_from_the_last_aggregate(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites())
    run(tmp_path, channel, rounds=2)
    first, second = channel.of(Task.TRAIN, "c")
    assert [first.meta["round"], second.meta["round"]] == [0, 1]
    torch.testing.assert_close(second.tensors["w"], INITIAL["w"] + 23 / 8)


def test_a_later_turn_sees_the_aggregate_of_the_earlier(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites())
    run(tmp_path, channel, OneByOne())
    received = {site: channel.of(Task.TRAIN, site)[0].tensors["w"][0, 0].item() for site in "abc"}
    assert received == {"a": 1.0, "b": 2.0, "c": 4.0}  # 1, then + 1 of a, then + 2 of b
    assert stored(tmp_path)["w"][0, 0].item() == 8.0


def test_results_name_rounds_seed_and_every_site(tmp_path: Path) -> None:
    results = run(tmp_path, DirectChannel(three_sites()), rounds=2)
    assert (results["job"], results["seed"], results["rounds"], results["best_round"]) == ("tiny", 3, 2, None)
    assert results["sites"] == {"a": {"cases": 1}, "b": {"cases": 3}, "c": {"cases": 4}}


def test_each_round_reports_the_mean_of_common_metrics(tmp_path: Path) -> None:
    seen: list[tuple[int, dict]] = []
    sites = three_sites()
    sites["a"].dice = [0.5, 0.5]
    run(tmp_path, DirectChannel(sites), rounds=2, on_round=lambda idx, metrics: seen.append((idx, dict(metrics))))
    loss = (1 + 2 + 4) / 3
    means = [(idx, {name: value for name, value in m.items() if name.startswith("mean_")}) for idx, m in seen]
    assert means == [(0, {"mean_loss": pytest.approx(loss)}), (1, {"mean_loss": pytest.approx(loss)})]


def test_a_failing_site_costs_its_own_part_when_the_job_allows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tampers = {(Task.TRAIN, "c", 0): lambda m: Failure("disk full")}
    with caplog.at_level(logging.INFO, "fedcmt"):
        run(tmp_path, DirectChannel(three_sites(), tampers), min_sites=2)
    assert stored(tmp_path)["w"].tolist() == [[1 + 7 / 4, 2 + 7 / 4, 3 + 7 / 4]]
    assert stored(tmp_path)["g@ct"].tolist() == [30.0, 40.0]
    assert "aggregated from 2 sites (a, b): " in caplog.text
    assert "; without ['c']. Site 'c': disk full" in caplog.text


def test_a_site_that_failed_takes_part_in_the_next_round(tmp_path: Path) -> None:
    tampers = {(Task.TRAIN, "c", 0): lambda m: Failure("disk full")}
    channel = DirectChannel(three_sites(), tampers)
    run(tmp_path, channel, rounds=2, min_sites=2)
    assert stored(tmp_path)["w"][0, 0].item() == 1 + 7 / 4 + 23 / 8


@pytest.mark.parametrize("min_sites", [None, 3])
def test_a_failing_site_ends_a_job_that_needs_it(min_sites: int | None, tmp_path: Path) -> None:
    tampers = {(Task.TRAIN, "b", 1): lambda m: Failure("disk full")}
    reason = r"round 2: 2 of 3 sites sent a usable update, at least 3 are needed\. Site 'b': disk full"
    with pytest.raises(FederationError, match=reason):
        run(tmp_path, DirectChannel(three_sites(), tampers), rounds=3, min_sites=min_sites)
    assert load_tensors(tmp_path / "state.safetensors")[1]["round"] == 0


def with_tensor(name: str, tensor: Tensor | None) -> Tamper:
    def change(answer: Message) -> Message:
        tensors = {**answer.tensors, name: tensor}
        return replace(answer, tensors={n: t for n, t in tensors.items() if t is not None})

    return change


REFUSED = {
    "not finite": (with_tensor("w", torch.tensor([[0.0, math.nan, 0.0]])), r"not finite: \[w\]"),
    "infinite": (with_tensor("g@ct", torch.tensor([math.inf, 0.0])), r"not finite: \[g@ct\]"),
    "huge": (with_tensor("w", torch.tensor([[0.0, -1e30, 0.0]])), r"w changes by 1e\+30, at most 1e\+06"),
    "double precision": (
        lambda m: replace(m, tensors={n: t.double() for n, t in m.tensors.items()}),
        r"torch\.float64 instead of torch\.float32",
    ),
    "half precision": (with_tensor("w", torch.ones(1, 3, dtype=torch.float16)), r"w torch\.float16 instead of"),
    "zero": (lambda m: replace(m, tensors={n: 0 * t for n, t in m.tensors.items()}), r"is zero everywhere"),
    "wrong shape": (with_tensor("w", torch.ones(3, 1)), r"w \(3, 1\) instead of \(1, 3\)"),
    "broadcastable shape": (with_tensor("w", torch.ones(1)), r"w \(1,\) instead of \(1, 3\)"),
    "unknown key": (with_tensor("decoder.bias", torch.ones(2)), r"1 unknown \[decoder\.bias\]"),
    "other group's key": (with_tensor("g@mr", torch.ones(2)), r"1 unknown \[g@mr\]"),
    "missing key": (with_tensor("w", None), r"1 parameters missing \[w\]"),
    "wrong round": (lambda m: replace(m, meta={**m.meta, "round": 4}), r"is of round 4, expected 0"),
    "no round": (lambda m: replace(m, meta={**m.meta, "round": None}), r"is of round None, expected 0"),
    "other task": (lambda m: replace(m, meta={**m.meta, "task": "evaluate"}), r"is of task 'evaluate', expected 'tra"),
    "other site": (lambda m: replace(m, meta={**m.meta, "site": "a"}), r"is of site 'a', expected 'c'"),
    "unasked extra": (lambda m: replace(m, extras={"anchor": torch.ones(1)}), r"has extras \['anchor'\], and the"),
    "no tensor": (lambda m: replace(m, tensors={**m.tensors, "w": [[1.0, 1.0, 1.0]]}), r"\['w'\] are not dense torch"),
    "integers": (with_tensor("w", torch.ones(1, 3, dtype=torch.int64)), r"w torch\.int64 instead of torch\.float32"),
    "absurd meta": (lambda m: replace(m, meta={**m.meta, "note": "x" * 10**7}), r"characters of plain values, at most"),
    "no meta": (lambda m: replace(m, meta=["round", 0]), r"meta is of type list, expected an object"),
}


@pytest.mark.parametrize("algorithm", [FedAvg, FedCMT])
@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_update_is_refused_by_site_and_the_round_goes_on_without_it(
    case: str, algorithm: type[Algorithm], tmp_path: Path
) -> None:
    tamper, reason = REFUSED[case]
    run(tmp_path / "bad", DirectChannel(three_sites(), {(Task.TRAIN, "c", 0): tamper}), algorithm(), min_sites=2)
    without = {(Task.TRAIN, "c", 0): lambda m: Failure("left out")}
    run(tmp_path / "without", DirectChannel(three_sites(), without), algorithm(), min_sites=2)
    bad, good = stored(tmp_path / "bad"), stored(tmp_path / "without")
    assert all(torch.equal(bad[name], good[name]) for name in good)
    with pytest.raises(FederationError, match=rf"Site 'c': .*{reason}"):
        run(tmp_path / "needed", DirectChannel(three_sites(), {(Task.TRAIN, "c", 0): tamper}))


@pytest.mark.parametrize("task", [Task.FINGERPRINT, Task.PREPARE])
def test_a_site_that_cannot_be_prepared_ends_the_job(task: Task, tmp_path: Path) -> None:
    channel = DirectChannel(three_sites(), {(task, "b", None): lambda m: Failure("no such data set")})
    with pytest.raises(FederationError, match=rf"task '{task.value}' failed\. Site 'b': no such data set"):
        run(tmp_path, channel, min_sites=1)
    assert not channel.of(Task.TRAIN, "a")


@pytest.mark.parametrize("meta", [{"num_cases": 0}, {"num_cases": "7"}, {"num_cases": True}, {"channels": None}])
def test_a_site_that_says_what_cannot_be_ends_the_job_by_name(meta: dict[str, Any], tmp_path: Path) -> None:
    tampers = {(Task.PREPARE, "b", None): lambda m: replace(m, meta={**m.meta, **meta})}
    with pytest.raises(FederationError, match=r"task 'prepare' failed\. Site 'b': num_cases"):
        run(tmp_path, DirectChannel(three_sites(), tampers))


@pytest.mark.parametrize("meta", [{"fingerprint": None}, {"modality": 3}, {"modality": " "}])
def test_a_site_that_does_not_introduce_itself_ends_the_job_by_name(meta: dict[str, Any], tmp_path: Path) -> None:
    tampers = {(Task.FINGERPRINT, "b", None): lambda m: replace(m, meta={**m.meta, **meta})}
    with pytest.raises(FederationError, match=r"task 'fingerprint' failed\. Site 'b': fingerprint of type"):
        run(tmp_path, DirectChannel(three_sites(), tampers))


def test_a_site_of_another_architecture_is_refused_before_training(tmp_path: Path) -> None:
    def other(answer: Message) -> Message:
        return replace(answer, meta={**answer.meta, "wire_shapes": {"w": [3, 1], "g@mr": [2]}})

    channel = DirectChannel(three_sites(), {(Task.PREPARE, "b", None): other})
    with pytest.raises(ValueError, match=r"site 'b' .*w \(1, 3\) instead of \(3, 1\)"):
        run(tmp_path, channel)
    assert not channel.of(Task.TRAIN, "a")


def test_the_best_round_keeps_the_state_that_was_validated(tmp_path: Path) -> None:
    sites = three_sites()
    sites["a"].dice, sites["b"].dice, sites["c"].dice = [0.2, 0.9, 0.6, 0.5], [0.3, 0.6, 0.9, 0.6], [0.4, 0.6, 0.5, 0.7]
    # Means 0.3, 0.7, 0.667, 0.6: round 1 is best; its sites received the aggregate of round 0.
    results = run(tmp_path, DirectChannel(sites), rounds=4)
    assert results["best_round"] == 1
    assert stored(tmp_path, "best")["w"].tolist() == [[1 + 23 / 8, 2 + 23 / 8, 3 + 23 / 8]]


def test_a_round_without_every_site_s_score_is_not_the_best(tmp_path: Path) -> None:
    sites = three_sites()
    sites["a"].dice, sites["b"].dice, sites["c"].dice = [0.9, 0.4], [0.9, 0.4], [0.1, 0.4]
    # Round 0 has the scores 0.9 of a and b alone; their mean is above that of all in round 1.
    tampers = {(Task.TRAIN, "c", 0): lambda m: Failure("disk full")}
    assert run(tmp_path, DirectChannel(sites, tampers), rounds=2, min_sites=2)["best_round"] == 1


class LateToStart(FedAvg):
    """Site c alone trains in round 0, as a fusion site may."""

    def turns(self, round_idx: int, sites: object) -> list[list[Participant]]:
        return [[site for site in sites if round_idx or site.name == "c"]]  # type: ignore[attr-defined]


def test_a_round_that_asks_some_sites_only_is_not_the_best(tmp_path: Path) -> None:
    sites = three_sites()
    sites["a"].dice, sites["b"].dice, sites["c"].dice = [0.0, 0.4], [0.0, 0.4], [0.9, 0.4]
    results = run(tmp_path, DirectChannel(sites), LateToStart(), rounds=2)
    assert results["best_round"] == 1
    assert results["participation"]["a"] == {"asked": 1, "took_part": 1, "absent": {}}
    assert results["participation"]["c"]["asked"] == 2


def test_the_first_of_equally_good_rounds_is_best(tmp_path: Path) -> None:
    sites = three_sites()
    for site in sites.values():
        site.dice = [0.5, 0.5]
    assert run(tmp_path, DirectChannel(sites), rounds=2)["best_round"] == 0
    assert torch.equal(stored(tmp_path, "best")["w"], INITIAL["w"])


def test_the_search_for_the_best_round_begins_again_with_other_sites(tmp_path: Path) -> None:
    sites = three_sites()
    for site, dice in (("a", 0.3), ("b", 0.5), ("c", 0.9)):
        sites[site].dice = [dice, dice - 0.1, dice - 0.2, dice - 0.1]
    run(tmp_path, DirectChannel(sites), rounds=2)
    fewer = {site: sites[site] for site in "ab"}
    results = run(tmp_path, DirectChannel(fewer), rounds=4, resume=True)
    assert results["best_round"] == 3  # 0.3, where the first two rounds had 0.57 and 0.47 with c
    assert load_tensors(tmp_path / "best.safetensors")[1]["best"] == [pytest.approx(0.3), 3]


def test_a_resumed_job_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    def sites() -> dict[str, ConstantSite]:
        made = three_sites()
        for site in made.values():
            site.dice = [0.1, 0.8, 0.2, 0.3]
        return made

    whole = run(tmp_path / "whole", DirectChannel(sites()), Momentum(), rounds=4)
    run(tmp_path / "parts", DirectChannel(sites()), Momentum(), rounds=2, schedule_rounds=4)
    rest = DirectChannel(sites())
    resumed = run(tmp_path / "parts", rest, Momentum(), rounds=4, resume=True)
    (whole_state, whole_meta), (state, meta) = (
        load_tensors(tmp_path / f / "state.safetensors") for f in ("whole", "parts")
    )
    assert [message.meta["round"] for message in rest.of(Task.TRAIN, "a")] == [2, 3]
    assert all(torch.equal(state[name], whole_state[name]) for name in whole_state)
    assert meta.pop("federation") != whole_meta.pop("federation")
    assert meta == whole_meta
    assert meta["record"] == {"aggregated": 4}
    assert resumed["best_round"] == whole["best_round"] == 1


def test_resuming_a_finished_job_trains_no_more(tmp_path: Path) -> None:
    run(tmp_path, DirectChannel(three_sites()), rounds=2)
    before = stored(tmp_path)
    channel = DirectChannel(three_sites())
    run(tmp_path, channel, rounds=2, resume=True)
    assert not channel.of(Task.TRAIN, "a")
    assert torch.equal(channel.of(Task.FINISH, "a")[0].tensors["w"], before["w"])


def test_a_job_that_is_not_resumed_starts_anew(tmp_path: Path) -> None:
    run(tmp_path, DirectChannel(three_sites()), rounds=3)
    run(tmp_path, DirectChannel(three_sites()), rounds=1)
    assert stored(tmp_path)["w"][0, 0].item() == 1 + 23 / 8


def test_the_state_of_another_job_is_refused(tmp_path: Path) -> None:
    run(tmp_path, DirectChannel(three_sites()), job="tiny")
    with pytest.raises(ParameterError, match=r"state\.safetensors: .*it is of \[job 'tiny', not 'other'"):
        run(tmp_path, DirectChannel(three_sites()), job="other", rounds=2, resume=True)


def test_the_state_of_another_federation_is_refused_and_the_one_before_it_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one of the same job with the same settings."""
    for name in ("own", "other"):
        run(tmp_path / name, DirectChannel(three_sites()), rounds=3)
    foreign = tmp_path / "own" / "state.safetensors"
    (tmp_path / "other" / "state.safetensors").replace(foreign)
    channel = DirectChannel(three_sites())
    run(tmp_path / "own", channel, rounds=3, resume=True)
    assert f"{foreign}: not a readable state file (it is of [federation '" in caplog.text
    assert [message.meta["round"] for message in channel.of(Task.TRAIN, "a")] == [2]


def test_resuming_without_a_federation_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path} holds no federation that began"):
        run(tmp_path, DirectChannel(three_sites()), resume=True)


def test_resuming_without_a_state_names_the_file(tmp_path: Path) -> None:
    run(tmp_path, DirectChannel(three_sites()))
    (tmp_path / "state.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"state\.safetensors"):
        run(tmp_path, DirectChannel(three_sites()), resume=True)


def test_other_settings_than_the_federation_s_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    run(tmp_path, DirectChannel(three_sites()))
    channel = DirectChannel(three_sites())
    with pytest.raises(ConfigError, match=r"server\.seed is 3 since this federation began and cannot become 4"):
        run(tmp_path, channel, rounds=2, resume=True, settings={"seed": 4})
    assert not channel.of(Task.FINGERPRINT, "a")


def test_sites_are_told_which_job_began_the_federation(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites())
    run(tmp_path, channel, settings={"continues": "0f1e2d3c-0000-4000-8000-000000000001"})
    assert [m.meta["continues"] for m in channel.of(Task.FINGERPRINT, "a")] == ["0f1e2d3c-0000-4000-8000-000000000001"]


def test_a_damaged_state_is_named_and_the_run_goes_on_from_the_one_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "whole", DirectChannel(three_sites()), Momentum(), rounds=4)
    run(tmp_path / "parts", DirectChannel(three_sites()), Momentum(), rounds=3, schedule_rounds=4)
    damaged = tmp_path / "parts" / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    channel = DirectChannel(three_sites())
    run(tmp_path / "parts", channel, Momentum(), rounds=4, resume=True)
    assert f"{damaged}: not a readable state file" in caplog.text
    assert [message.meta["round"] for message in channel.of(Task.TRAIN, "a")] == [2, 3]
    whole, parts = (load_tensors(tmp_path / name / "state.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[0][name], parts[0][name]) for name in whole[0])
    assert whole[1].pop("federation") != parts[1].pop("federation")
    assert whole[1] == parts[1]


def test_a_run_that_starts_anew_never_goes_back_to_a_state_of_an_earlier_one(tmp_path: Path) -> None:
    run(tmp_path, DirectChannel(three_sites()), rounds=3)
    run(tmp_path, DirectChannel(three_sites()), rounds=1)
    assert not (tmp_path / "state_before.safetensors").exists()
    (tmp_path / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(ParameterError, match=r"state\.safetensors: not a readable state file"):
        run(tmp_path, DirectChannel(three_sites()), rounds=2, resume=True)


def test_the_best_state_is_none_to_go_on_from(tmp_path: Path) -> None:
    sites = {name: replace(site, dice=[0.5]) for name, site in three_sites().items()}
    run(tmp_path, DirectChannel(sites))
    (tmp_path / "best.safetensors").rename(tmp_path / "state.safetensors")
    with pytest.raises(ParameterError, match=r"state\.safetensors: .*it lacks \[contribution, crossed"):
        run(tmp_path, DirectChannel(sites), rounds=2, resume=True)


def test_plans_that_changed_on_disk_are_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, DirectChannel(three_sites()))
    path = tmp_path / "plans.json"
    path.write_text(path.read_text().replace('"cases": 3', '"cases": 7'))
    with pytest.raises(JsonFileError, match=r"plans\.json: damaged, its checksum"):
        run(tmp_path, DirectChannel(three_sites()), rounds=2, resume=True)


def test_sites_that_end_with_the_aggregate_receive_it_at_the_end(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites())
    run(tmp_path, channel, FedAvg())
    last = channel.of(Task.FINISH, "c")[0].tensors
    assert sorted(last) == ["g@ct", "w"]
    assert last["w"][0, 0].item() == 1 + 23 / 8


def test_sites_that_end_with_their_own_model_receive_nothing_at_the_end(tmp_path: Path) -> None:
    class Trained(FedCMT):
        """FedCMT's product with these tests' names."""

        scopes: ClassVar = FedAvg.scopes

    channel = DirectChannel(three_sites())
    run(tmp_path, channel, Trained())
    assert [channel.of(Task.FINISH, site)[0].tensors for site in "abc"] == [{}, {}, {}]


MALFORMED: dict[str, Callable[[Message], Message]] = {
    "num_steps is None": lambda m: replace(m, meta={k: v for k, v in m.meta.items() if k != "num_steps"}),
    "metrics are {'loss': 'x'}": lambda m: replace(m, meta={**m.meta, "metrics": {"loss": "x"}}),
    "validation scores {'val_dice_received': 1e+300}": lambda m: replace(
        m, meta={**m.meta, "metrics": {"val_dice_received": 1e300}}
    ),
    "num_steps is True": lambda m: replace(m, meta={**m.meta, "num_steps": True}),
    "num_steps is 1000000000000": lambda m: replace(m, meta={**m.meta, "num_steps": 10**12}),
    "metrics are [0.5]": lambda m: replace(m, meta={**m.meta, "metrics": [0.5]}),
    "metrics {'loss': 1e+300} are beyond 1e+12": lambda m: replace(m, meta={**m.meta, "metrics": {"loss": 1e300}}),
    "101 metrics, 0 of them": lambda m: replace(m, meta={**m.meta, "metrics": {f"m{i}": 0.5 for i in range(101)}}),
    "1 metrics, 1 of them": lambda m: replace(m, meta={**m.meta, "metrics": {"m" * 101: 0.5}}),
    "metrics are {'loss': nan}": lambda m: replace(m, meta={**m.meta, "metrics": {"loss": math.nan}}),
}


@pytest.mark.parametrize("reason", MALFORMED)
def test_a_malformed_answer_costs_its_site_only_its_part(
    reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run(tmp_path, DirectChannel(three_sites(), {(Task.TRAIN, "c", 0): MALFORMED[reason]}), min_sites=2)
    assert f"update of site 'c': {reason}" in caplog.text


def test_a_site_cannot_raise_its_weight_by_what_it_says_after_a_round(tmp_path: Path) -> None:
    def boast(answer: Message) -> Message:
        return replace(answer, meta={**answer.meta, "num_cases": 10**6})

    run(tmp_path, DirectChannel(three_sites(), {(Task.TRAIN, "c", 0): boast}))
    assert stored(tmp_path)["w"][0, 0].item() == 1 + 23 / 8


def test_an_answer_of_an_earlier_round_is_refused_when_it_is_sent_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first: list[Message] = []
    tampers: dict[tuple[Task, str, int | None], Tamper] = {
        (Task.TRAIN, "c", 0): lambda m: first.append(m) or m,  # type: ignore[func-returns-value]
        (Task.TRAIN, "c", 1): lambda m: first[0],
    }
    with caplog.at_level(logging.INFO, "fedcmt"):
        run(tmp_path, DirectChannel(three_sites(), tampers), rounds=2, min_sites=2)
    assert "round 2/2 aggregated from 2 sites (a, b)" in caplog.text
    assert "Site 'c': is of round 0, expected 1" in caplog.text
    assert stored(tmp_path)["w"][0, 0].item() == 1 + 23 / 8 + 7 / 4


class Tardy(DirectChannel):
    """Site c answers round 0 only once round 1 has begun."""

    def exchange(
        self, task: Task, messages: Mapping[str, Message], keep: Keep = as_it_is
    ) -> dict[str, Message | Failure]:
        round_idx = next(iter(messages.values())).meta.get("round")
        if task is Task.TRAIN and round_idx == 0:
            self.late = lambda: self._kept(keep, "c", stamped(task, "c", self.sites["c"].handle(task, messages["c"])))
            on_time = super().exchange(task, {site: m for site, m in messages.items() if site != "c"}, keep)
            return {**on_time, "c": Failure("no answer within 20 s")}
        if task is Task.TRAIN:
            self.answer_of_late = self.late()
        return super().exchange(task, messages, keep)


def test_an_answer_after_its_task_has_ended_counts_in_no_round(tmp_path: Path) -> None:
    channel = Tardy(three_sites())
    results = run(tmp_path, channel, rounds=2, min_sites=2)
    assert channel.answer_of_late == Failure("unreadable answer")
    assert results["participation"]["c"] == {"asked": 2, "took_part": 1, "absent": {"1": "no answer within 20 s"}}
    assert stored(tmp_path)["w"][0, 0].item() == 1 + 7 / 4 + 23 / 8


def test_results_say_who_took_part_and_why_others_did_not(tmp_path: Path) -> None:
    nan = with_tensor("w", torch.full((1, 3), math.nan))
    tampers = {(Task.TRAIN, "c", 0): lambda m: Failure("disk\n full"), (Task.TRAIN, "b", 2): nan}
    channel = DirectChannel(three_sites(), tampers)
    participation = run(tmp_path, channel, rounds=3, min_sites=2)["participation"]
    assert participation == {
        "a": {"asked": 3, "took_part": 3, "absent": {}},
        "b": {"asked": 3, "took_part": 2, "absent": {"3": "update of site 'b': 1 tensors are not finite: [w]."}},
        "c": {"asked": 3, "took_part": 2, "absent": {"1": "disk  full"}},
    }
    assert [row["absent"] for row in rows_of(tmp_path)] == [
        {"c": "disk  full"},
        {},
        {"b": participation["b"]["absent"]["3"]},
    ]


def test_participation_counts_on_in_a_resumed_job(tmp_path: Path) -> None:
    tampers = {(Task.TRAIN, "c", 0): lambda m: Failure("disk full")}
    run(tmp_path, DirectChannel(three_sites(), tampers), rounds=2, min_sites=2)
    results = run(tmp_path, DirectChannel(three_sites()), rounds=3, resume=True)
    assert results["participation"]["c"] == {"asked": 3, "took_part": 2, "absent": {"1": "disk full"}}


def wild(factor: float) -> dict[str, ConstantSite]:
    return {site: ConstantSite(step, 1) for site, step in (("a", 1.0), ("b", 1.0), ("c", factor))}


def test_an_oversized_update_is_scaled_before_it_is_aggregated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[dict[str, float]] = []
    with caplog.at_level(logging.WARNING, "fedcmt"):
        run(
            tmp_path,
            DirectChannel(wild(500.0)),
            max_norm_ratio=2.0,
            on_round=lambda i, curves: seen.append(dict(curves)),
        )
    assert "round 1: update of site 'c' is oversized, scaled by 0.004" in caplog.text
    assert stored(tmp_path)["w"].tolist()[0] == pytest.approx([1 + 4 / 3, 2 + 4 / 3, 3 + 4 / 3])
    (row,) = rows_of(tmp_path)
    assert row["influence"] == {"a": 1.0, "b": 1.0, "c": pytest.approx(0.004)}
    assert {n: v for n, v in seen[0].items() if n.startswith("influence/")} == {
        "influence/a": 1.0, "influence/b": 1.0, "influence/c": pytest.approx(0.004),
    }  # fmt: skip
    assert not list((tmp_path / "bounded").iterdir())


def test_updates_of_like_size_are_aggregated_as_without_a_bound(tmp_path: Path) -> None:
    run(tmp_path / "with", DirectChannel(wild(1.5)), max_norm_ratio=2.0)
    run(tmp_path / "without", DirectChannel(wild(1.5)))
    assert all(torch.equal(stored(tmp_path / "with")[n], t) for n, t in stored(tmp_path / "without").items())
    assert rows_of(tmp_path / "without")[0]["influence"] == {}


def test_an_influence_that_cannot_be_bounded_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    two = {site: s for site, s in three_sites().items() if site != "c"}
    for sites, reason, more in (
        (two, r"max_norm_ratio is 2, and the job has 2 sites", {}),
        (three_sites(), r"guarantee of central_client_dp excludes", {"privacy": CENTRAL}),
        (three_sites(), r"Standalone exchanges nothing to bound", {"algorithm": Standalone()}),
    ):
        channel = DirectChannel(sites)
        with pytest.raises(FederationError, match=reason):
            run(tmp_path, channel, max_norm_ratio=2.0, **more)
        assert not channel.sent


def sites_with(*channels: tuple[str, str, list[str]]) -> list[Participant]:
    return [Participant(name, "MR", tuple(own), 5, {}, role) for name, role, own in channels]


def test_a_channel_that_one_site_alone_has_may_be_misspelt(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fedcmt"):
        _warn_of_lonely_channels(sites_with(("a", "site", ["T1", "T2"]), ("b", "site", ["T1", "t_2"])))
    assert [record.getMessage() for record in caplog.records] == [
        "only site a has MR channel 'T2'; misspelt?",
        "only site b has MR channel 't_2'; misspelt?",
    ]


def test_other_names_of_a_sequence_are_not_misspelt(caplog: pytest.LogCaptureFixture) -> None:
    wires = ({"encoders.T1ce.w": (1,)}, {"encoders.T1ce.w": (1,), "encoders.T2.w": (1,)})
    named = sites_with(("a", "site", ["T1Gd"]), ("b", "site", ["t1ce", "T2"]))
    with caplog.at_level(logging.WARNING, "fedcmt"):
        _warn_of_lonely_channels([replace(p, wire_shapes=wire) for p, wire in zip(named, wires, strict=True)])
    assert not caplog.records


def test_a_channel_that_the_fusion_site_has_is_not_misspelt(caplog: pytest.LogCaptureFixture) -> None:
    fusion = ("f", "fusion", ["T1", "T2", "FLAIR"])
    with caplog.at_level(logging.WARNING, "fedcmt"):
        _warn_of_lonely_channels(sites_with(("a", "site", ["T1"]), ("b", "site", ["T2"]), fusion))
        assert not caplog.records
        _warn_of_lonely_channels(sites_with(("a", "site", ["T1"]), ("b", "site", ["t_2"]), fusion))
    assert [record.getMessage() for record in caplog.records] == ["only site b has MR channel 't_2'; misspelt?"]


def test_a_report_that_is_none_costs_its_site_its_own(tmp_path: Path) -> None:
    channel = DirectChannel(
        three_sites(), {(Task.FINISH, "b", None): lambda m: replace(m, meta={**m.meta, "report": [1]})}
    )
    results = run(tmp_path, channel, min_sites=2)
    assert results["failed"] == {"b": "report is of type list, expected an object"}


def test_a_site_that_cannot_finish_costs_its_own_report_when_others_are_enough(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites(), {(Task.FINISH, "b", None): lambda m: Failure("disk full")})
    results = run(tmp_path, channel, min_sites=2)
    assert sorted(results["sites"]) == ["a", "c"]
    assert results["failed"] == {"b": "disk full"}


def test_too_few_finished_sites_end_the_job_by_name(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites(), {(Task.FINISH, "b", None): lambda m: Failure("disk full")})
    with pytest.raises(FederationError, match="Site 'b': disk full"):
        run(tmp_path, channel)


def test_a_site_that_joins_changes_nothing_of_the_others(tmp_path: Path) -> None:
    founders = {"a": ConstantSite(1.0, 1), "b": ConstantSite(2.0, 3)}
    run(tmp_path, DirectChannel(founders), FedCMT(), rounds=2)
    before, meta = load_tensors(tmp_path / "state.safetensors")
    plans, planner = read_json(tmp_path / "plans.json"), GivenPlanner()
    channel = DirectChannel({**founders, "c": ConstantSite(4.0, 4, modality="CT")})
    run(tmp_path, channel, FedCMT(), rounds=3, resume=True, planner=planner)
    assert planner.asked == [["c"]]
    assert [message.meta["plans"] for message in channel.of(Task.PREPARE, "a")] == [plans["a"]]
    (received,) = channel.of(Task.TRAIN, "a")
    assert all(torch.equal(received.tensors[name], before[f"params/{name}"]) for name in ("w", "g@mr"))
    (theirs,) = channel.of(Task.TRAIN, "c")
    assert theirs.meta["frozen"] == ["w"]  # its adapter is new, so it trains
    assert torch.equal(theirs.tensors["g@ct"], INITIAL["g@ct"])
    after, record = load_tensors(tmp_path / "state.safetensors")[0], load_tensors(tmp_path / "state.safetensors")[1]
    alone = run_two_more(tmp_path / "alone", founders)
    assert all(torch.equal(after[name], alone[name]) for name in before)  # momentum buffers are among them
    assert record["record"]["round"] == 3
    assert {s: record["record"]["agreement"][s] for s in founders} == meta_of(tmp_path / "alone")["agreement"]
    assert meta["record"]["num_rounds"] == record["record"]["num_rounds"]


def test_a_site_whose_joining_came_to_nothing_may_join_with_other_data(tmp_path: Path) -> None:
    founders = {"a": ConstantSite(1.0, 1), "b": ConstantSite(2.0, 3)}
    run(tmp_path, DirectChannel(founders), rounds=2)
    ended = DirectChannel({**founders, "c": ConstantSite(4.0, 4)}, {(Task.PREPARE, "c", None): lambda m: Failure("")})
    with pytest.raises(FederationError, match="'prepare' failed"):
        run(tmp_path, ended, rounds=3, resume=True)
    again = DirectChannel({**founders, "c": ConstantSite(4.0, 9)})
    run(tmp_path, again, rounds=3, resume=True)
    assert again.of(Task.PREPARE, "c")[0].meta["plans"] == {"for": "c", "cases": 9}
    without = {site: again.sites[site] for site in "ab"}
    run(tmp_path, DirectChannel(without), rounds=4, resume=True)
    back = DirectChannel({**founders, "c": ConstantSite(4.0, 5)})
    run(tmp_path, back, rounds=5, resume=True)
    assert back.of(Task.PREPARE, "c")[0].meta["plans"] == {"for": "c", "cases": 9}  # it has been a member since


def test_fewer_rounds_than_were_finished_are_refused_before_a_site_is_asked(tmp_path: Path) -> None:
    run(tmp_path, DirectChannel(three_sites()), rounds=3)
    channel = DirectChannel(three_sites())
    with pytest.raises(FederationError, match="this run has finished 3 rounds, not 2 or fewer"):
        run(tmp_path, channel, rounds=2, resume=True)
    assert channel.sent == []


def run_two_more(folder: Path, founders: dict[str, ConstantSite]) -> dict[str, Tensor]:
    """The founders' third round as it would have been without a newcomer."""
    run(folder, DirectChannel(founders), FedCMT(), rounds=2)
    run(folder, DirectChannel(founders), FedCMT(), rounds=3, resume=True)
    return load_tensors(folder / "state.safetensors")[0]


def meta_of(folder: Path) -> dict[str, Any]:
    return load_tensors(folder / "state.safetensors")[1]["record"]


def test_a_turn_that_cannot_save_its_round_is_not_asked_for(tmp_path: Path) -> None:
    failing = {(Task.TRAIN, site, 1): lambda m: Failure("out of memory") for site in "ab"}
    channel = DirectChannel(three_sites(), failing)
    with pytest.raises(FederationError, match=r"round 2: 0 of 2 sites .* at least 2 are needed\. Site 'a'"):
        run(tmp_path, channel, OneByOne(), rounds=2, min_sites=2)
    assert [message.meta["round"] for message in channel.of(Task.TRAIN, "c")] == [0]


def test_the_algorithm_is_told_who_has_left(tmp_path: Path) -> None:
    told = []

    class Parting(FedAvg):
        def leave(self, state: State, site: str) -> State:
            told.append(site)
            return replace(state, params={name: tensor + 1 for name, tensor in state.params.items()})

    sites = three_sites()
    run(tmp_path, DirectChannel(sites), Parting())
    assert not told
    channel = DirectChannel({"a": sites["a"]})
    before = stored(tmp_path)
    run(tmp_path, channel, Parting(), rounds=2, resume=True)
    assert told == ["b", "c"]
    assert torch.equal(channel.of(Task.TRAIN, "a")[0].tensors["w"], before["w"] + 2)


def test_a_site_leaves_and_comes_back_with_its_agreement(tmp_path: Path) -> None:
    sites = three_sites()
    run(tmp_path, DirectChannel(sites), FedCMT(), rounds=1)
    kept = meta_of(tmp_path)["agreement"]["c"]
    run(tmp_path, DirectChannel({s: sites[s] for s in "ab"}), FedCMT(), rounds=2, resume=True)
    assert meta_of(tmp_path)["agreement"]["c"] == kept
    assert torch.equal(stored(tmp_path)["g@ct"], INITIAL["g@ct"] + 4.0)  # a group without members stays
    channel = DirectChannel(sites)
    run(tmp_path, channel, FedCMT(), rounds=3, resume=True)
    assert [message.meta["frozen"] for message in channel.of(Task.TRAIN, "c")] == [[]]  # no warm start again
    assert meta_of(tmp_path)["joined"]["c"] == {"warm": 0, "counted": 1, "own": []}


def test_schedules_stay_those_of_the_first_start(tmp_path: Path) -> None:
    run(tmp_path, DirectChannel(three_sites()), FedCMT(), rounds=2)
    channel = DirectChannel(three_sites())
    run(tmp_path, channel, FedCMT(), rounds=5, resume=True)
    meta = channel.of(Task.PREPARE, "b")[0].meta
    assert (meta["num_rounds"], meta["schedule_rounds"]) == (5, 2)
    again = DirectChannel(three_sites())
    run(tmp_path, again, FedCMT(), rounds=6, resume=True)
    assert again.of(Task.PREPARE, "b")[0].meta["schedule_rounds"] == 2


def test_each_round_is_a_line_for_machines(tmp_path: Path) -> None:
    run(tmp_path, DirectChannel(three_sites()), FedCMT(), rounds=2)
    rows = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1]
    assert rows[0]["sites"]["b"] == {"loss": 2.0}
    assert {"weight/a", "agreement/b", "norm/c", "cosine/a-b", "step_norm", "step_cosine/c"} <= set(rows[0]["server"])
    assert rows[0]["server"]["norm/c"] == pytest.approx(4 * math.sqrt(3))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def exchanged(channel: DirectChannel, task: Task) -> int:
    return sum(1 for t, _, _ in channel.sent if t is task)


def opposed() -> dict[str, ConstantSite]:
    # With 1, 3 and 4 cases the mean step is (1 * 1 + 3 * 2 - 4 * 1) / 8 = 3 / 8.
    return {"a": ConstantSite(1.0, 1), "b": ConstantSite(2.0, 3), "c": ConstantSite(-1.0, 4, modality="CT")}


def test_each_round_says_where_the_updates_point(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    run(tmp_path, DirectChannel(opposed()), on_round=lambda idx, curves: seen.append(dict(curves)))
    (row,) = rows_of(tmp_path)
    # Over w alone, three equal elements: no CT site has g@mr.
    assert row["contribution"] == {
        "a": {"cases": 1, "case_share": 1 / 8, "norm": pytest.approx(math.sqrt(3)), "cos_mean": 1.0, "cos_loo": 1.0},
        "b": {
            "cases": 3, "case_share": 3 / 8, "norm": pytest.approx(2 * math.sqrt(3)), "cos_mean": 1.0, "cos_loo": -1.0,
        },
        "c": {"cases": 4, "case_share": 1 / 2, "norm": pytest.approx(math.sqrt(3)), "cos_mean": -1.0, "cos_loo": -1.0},
    }  # fmt: skip
    assert row["cosines"] == {"a-b": 1.0, "a-c": -1.0, "b-c": -1.0}
    assert row["games"] == []
    assert {name: value for name, value in seen[0].items() if name.endswith(("/b", "/b-c"))} == {
        "cos_mean/b": 1.0, "cos_loo/b": -1.0, "update_norm/b": pytest.approx(2 * math.sqrt(3)),
        "update_cosine/b-c": -1.0,
    }  # fmt: skip


def test_directions_compare_all_tensors_that_every_site_sends(tmp_path: Path) -> None:
    run(tmp_path, DirectChannel({site: s for site, s in three_sites().items() if site != "c"}))
    assert rows_of(tmp_path)[0]["contribution"]["a"]["norm"] == pytest.approx(math.sqrt(5))  # w and g@mr


def test_a_site_behind_a_frozen_encoder_is_left_out_of_the_directions(tmp_path: Path) -> None:
    founders = {"a": ConstantSite(1.0, 1), "b": ConstantSite(2.0, 3)}
    run(tmp_path, DirectChannel(founders), FedCMT(), rounds=1)
    sites = {**founders, "c": ConstantSite(4.0, 4, modality="CT")}
    run(tmp_path, DirectChannel(sites), FedCMT(), rounds=2, resume=True)
    found = rows_of(tmp_path)[1]["contribution"]
    assert found["c"] == {"cases": 4, "case_share": 1 / 2}
    assert found["a"]["cos_loo"] == pytest.approx(1.0)


def test_results_sum_up_the_directions_and_ask_nothing_of_the_sites(tmp_path: Path) -> None:
    channel = DirectChannel(opposed())
    results = run(tmp_path, channel, rounds=2)
    assert results["contribution"]["c"] == {
        "mean_norm": pytest.approx(math.sqrt(3)), "mean_cos_mean": -1.0, "mean_cos_loo": -1.0,
    }  # fmt: skip
    assert "cross_site" not in results
    assert exchanged(channel, Task.EVALUATE) == 0


def gentle_sites() -> dict[str, ConstantSite]:
    """Three sites whose models keep a score below 1 for some rounds."""
    return {"a": ConstantSite(0.1, 1), "b": ConstantSite(0.2, 3), "c": ConstantSite(-0.1, 4, modality="CT")}


# A tenth of the mean of w: {} 2, a 3, b 4, c 6, ab 2 + 7/4, ac 2 + 17/5, bc 2 + 22/7, abc 2 + 23/8.
UTILITY = {"": 0.2, "a": 0.3, "b": 0.4, "c": 0.6, "ab": 0.375, "ac": 0.54, "bc": 36 / 70, "abc": 39 / 80}


def test_leave_one_out_scores_the_model_without_each_site(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites())
    results = run(tmp_path, channel, contribution=ContributionConfig(tier=1))
    (row,) = rows_of(tmp_path)
    loo = {site: fields["loo"] for site, fields in row["contribution"].items()}
    assert loo == {site: pytest.approx(39 / 80 - UTILITY["abc".replace(site, "")], abs=1e-6) for site in "abc"}
    assert row["games"] == [{"received": pytest.approx(0.2), "everyone": pytest.approx(39 / 80), "evaluations": 5}]
    assert exchanged(channel, Task.EVALUATE) == 5 * 3
    assert results["contribution"]["a"]["loo_cum"] == loo["a"]
    assert "share" not in results["contribution"]["a"]


def test_shapley_values_of_a_round_sum_to_what_it_gained(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites())
    results = run(tmp_path, channel, contribution=ContributionConfig(tier=2))
    phi = {site: row["phi_cum"] for site, row in results["contribution"].items()}
    u = UTILITY
    a = (u["a"] - u[""]) / 3 + (u["ab"] - u["b"] + u["ac"] - u["c"]) / 6 + (u["abc"] - u["bc"]) / 3
    assert phi["a"] == pytest.approx(a, abs=1e-6)
    assert sum(phi.values()) == pytest.approx(39 / 80 - 0.2, abs=1e-6)
    assert sum(row["share"] for row in results["contribution"].values()) == pytest.approx(1)
    assert exchanged(channel, Task.EVALUATE) == 8 * 3
    assert abs(rows_of(tmp_path)[0]["games"][0]["residual"]) < 1e-6


def test_few_sites_are_sampled_in_every_order(tmp_path: Path) -> None:
    exact = run(tmp_path / "2", DirectChannel(three_sites()), contribution=ContributionConfig(tier=2))
    config = ContributionConfig(tier=3, between_rounds=0, within_permutation=0)
    sampled = run(tmp_path / "3", DirectChannel(three_sites()), contribution=config)
    phi = [{site: row["phi_cum"] for site, row in results["contribution"].items()} for results in (exact, sampled)]
    assert phi[1] == pytest.approx(phi[0])


def test_scoring_coalitions_changes_nothing_of_the_training(tmp_path: Path) -> None:
    run(tmp_path / "with", DirectChannel(three_sites()), rounds=2, contribution=ContributionConfig(2), cross_site=True)
    run(tmp_path / "without", DirectChannel(three_sites()), rounds=2)
    left, right = (stored(tmp_path / name) for name in ("with", "without"))
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_a_coalition_s_model_has_its_members_group_tensors_and_others_as_received(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites())
    run(tmp_path, channel, contribution=ContributionConfig(tier=2))
    seen = {round(10 * m.tensors["w"].mean().item()): m.tensors for m in channel.of(Task.EVALUATE, "a")}
    assert seen[20]["g@mr"].tolist() == [10.0, 20.0]
    assert seen[60]["g@mr"].tolist() == [10.0, 20.0]  # c alone has no part in it
    assert seen[54]["g@mr"].tolist() == [11.0, 21.0]  # of a and c only a
    assert {tuple(sorted(m.tensors)) for m in channel.of(Task.EVALUATE, "c")} == {("g@ct", "w")}


def test_games_are_played_every_so_many_rounds(tmp_path: Path) -> None:
    results = run(tmp_path, DirectChannel(gentle_sites()), rounds=4, contribution=ContributionConfig(tier=1, every=2))
    assert [len(row["games"]) for row in rows_of(tmp_path)] == [0, 1, 0, 1]
    assert results["contribution"]["b"]["games"] == 2


def test_each_turn_is_a_game_of_its_own(tmp_path: Path) -> None:
    run(tmp_path, DirectChannel(three_sites()), OneByOne(), contribution=ContributionConfig(tier=2))
    (row,) = rows_of(tmp_path)
    assert [fields["phi"] for fields in row["contribution"].values()] == pytest.approx([0.1, 0.2, 0.4])
    assert row["cosines"] == {}


def test_an_absent_site_has_no_part_in_a_round(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites(), {(Task.TRAIN, "c", 0): lambda m: Failure("disk full")})
    run(tmp_path, channel, min_sites=2, contribution=ContributionConfig(tier=2))
    assert sorted(rows_of(tmp_path)[0]["contribution"]) == ["a", "b"]
    assert not channel.of(Task.EVALUATE, "c")


UNSCORED: dict[str, tuple[Tamper, str]] = {
    "failed": (lambda m: Failure("no memory"), "site 'b': no memory"),
    "other round": (lambda m: replace(m, meta={**m.meta, "round": 3}), "of round 3"),
    "no score": (lambda m: replace(m, meta={**m.meta, "score": None}), "score None"),
    "not finite": (lambda m: replace(m, meta={**m.meta, "score": math.nan}), "score nan"),
    "above one": (lambda m: replace(m, meta={**m.meta, "score": 1.5}), "score 1.5"),
}


@pytest.mark.parametrize("case", UNSCORED)
def test_without_a_site_s_score_the_round_has_no_values_and_goes_on(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tamper, reason = UNSCORED[case]
    channel = DirectChannel(three_sites(), {(Task.EVALUATE, "b", 0): tamper})
    with caplog.at_level(logging.WARNING):
        results = run(tmp_path, channel, rounds=2, contribution=ContributionConfig(tier=2))
    assert "no contribution values" in caplog.text
    assert reason in caplog.text
    assert results["contribution"]["a"]["games"] == 1
    assert "phi" not in rows_of(tmp_path)[0]["contribution"]["a"]
    assert len([m for m in channel.of(Task.EVALUATE, "a") if m.meta["round"] == 0]) == 1  # and no more is asked


def test_contributions_add_up_over_a_resumed_job(tmp_path: Path) -> None:
    config = ContributionConfig(tier=2)
    whole = run(tmp_path / "whole", DirectChannel(gentle_sites()), rounds=3, contribution=config)
    run(tmp_path / "parts", DirectChannel(gentle_sites()), rounds=2, contribution=config)
    parts = run(tmp_path / "parts", DirectChannel(gentle_sites()), rounds=3, contribution=config, resume=True)
    assert parts["contribution"] == whole["contribution"]
    assert parts["contribution"]["c"]["games"] == 3


def test_more_sites_than_coalitions_can_be_scored_end_the_job_before_it_begins(tmp_path: Path) -> None:
    channel = DirectChannel({f"s{i:02}": ConstantSite(1.0, 1) for i in range(11)})
    with pytest.raises(FederationError, match=r"tier 2 scores 2\^11 models a round.*use tier 3"):
        run(tmp_path, channel, contribution=ContributionConfig(tier=2))
    assert not channel.sent


@pytest.mark.parametrize("more", [{"contribution": ContributionConfig(tier=1)}, {"cross_site": True}])
def test_there_is_nothing_to_score_where_nothing_is_exchanged(more: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="Standalone exchanges nothing"):
        run(tmp_path, DirectChannel(three_sites()), Standalone(), **more)


def test_each_site_s_model_is_scored_at_every_other_with_its_own_head(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites())
    results = run(tmp_path, channel, rounds=2, cross_site=True)
    start = 2 + 23 / 8  # received in the last round
    scores = {site: (start + step) / 10 for site, step in (("a", 1), ("b", 2), ("c", 4))}
    assert results["cross_site"] == {
        of: {at: pytest.approx(score, abs=1e-6) for at in "abc"} for of, score in scores.items()
    }
    assert results["cross_site_heads"] == {"a": "own", "b": "own", "c": "own"}
    at_c = channel.of(Task.EVALUATE, "c")
    assert {tuple(sorted(m.tensors)) for m in at_c} == {("g@ct", "w")}
    assert [round(m.tensors["g@ct"][0].item(), 3) for m in at_c] == [38.0, 34.0, 34.0]  # its own, then as received
    assert all(m.meta["round"] == 1 for m in at_c)


def test_a_model_with_its_head_is_scored_only_where_labels_are_the_same(tmp_path: Path) -> None:
    sites = three_sites()
    sites["a"].outputs = sites["b"].outputs = {"task": "segmentation", "labels": {"background": 0, "liver": 1}}
    sites["c"].outputs = {"task": "segmentation", "labels": {"background": 0, "spleen": 1}}
    results = run(tmp_path, DirectChannel(sites), cross_site=True)
    known = {of: [at for at, score in row.items() if score is not None] for of, row in results["cross_site"].items()}
    assert known == {"a": ["a", "b"], "b": ["a", "b"], "c": ["c"]}
    assert set(results["cross_site_heads"].values()) == {"received"}


def test_a_site_that_gives_no_score_is_a_gap_in_the_matrix(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites(), {(Task.EVALUATE, "b", 0): lambda m: Failure("no memory")})
    results = run(tmp_path, channel, cross_site=True)
    gaps = {of: [at for at, score in row.items() if score is None] for of, row in results["cross_site"].items()}
    assert gaps == {"a": ["b"], "b": ["a", "b", "c"], "c": ["b"]}


def test_resuming_a_finished_job_keeps_its_matrix(tmp_path: Path) -> None:
    first = run(tmp_path, DirectChannel(three_sites()), cross_site=True)
    again = run(tmp_path, DirectChannel(three_sites()), cross_site=True, resume=True)
    assert again["cross_site"] == first["cross_site"]


CENTRAL = PrivacyTerms("central_client_dp", clip=1.0, noise_multiplier=4.0, max_epsilon=2.0, noise="seeded")
"""One round costs 0.926, two 1.356, four 1.993, five 2.258."""


def test_sites_are_told_the_terms_before_they_send_anything(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites())
    run(tmp_path, channel, privacy=CENTRAL)
    (told,) = channel.of(Task.FINGERPRINT, "a")
    assert PrivacyTerms.from_dict(told.meta["privacy"], "told") == CENTRAL
    assert told.meta["num_sites"] == 3


def test_training_ends_before_the_round_that_would_exceed_the_budget_and_the_models_are_kept(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites())
    results = run(tmp_path, channel, rounds=9, privacy=CENTRAL)
    trained = len(channel.of(Task.TRAIN, "a"))
    assert 0 < trained < 9
    assert len(channel.of(Task.FINISH, "a")) == 1
    assert results["privacy"]["epsilon"] <= 2.0
    assert f"round {trained + 1}" in results["privacy"]["stopped"]
    uncovered = [entry.split(":")[0] for entry in results["privacy"]["not_covered"]]
    assert uncovered == ["planning statistics", "case counts", "test scores"]


def test_a_resumed_federation_goes_on_with_its_ledger(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", DirectChannel(three_sites()), rounds=3, privacy=CENTRAL)
    run(tmp_path / "parts", DirectChannel(three_sites()), rounds=2, privacy=CENTRAL)
    parts = run(tmp_path / "parts", DirectChannel(three_sites()), rounds=3, privacy=CENTRAL, resume=True)
    assert parts["privacy"]["epsilon"] == whole["privacy"]["epsilon"]
    assert all(torch.equal(stored(tmp_path / "parts")[n], t) for n, t in stored(tmp_path / "whole").items())


def test_a_budget_without_a_single_round_ends_the_job_before_anything_is_asked(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites())
    with pytest.raises(FederationError, match="does not allow a single round"):
        run(tmp_path, channel, privacy=replace(CENTRAL, max_epsilon=0.1))
    assert not channel.sent


def test_an_algorithm_that_the_terms_do_not_cover_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites())
    with pytest.raises(ValueError, match="under FedMEPD sites send tensors beside their updates"):
        run(tmp_path, channel, FedMEPD(), privacy=CENTRAL)
    assert not channel.sent
    assert not (tmp_path / "privacy.jsonl").exists()


def test_every_release_is_in_the_ledger_before_it_is_asked_for(tmp_path: Path) -> None:
    asked: list[tuple[Task, str]] = []

    class Reading(DirectChannel):
        def exchange(
            self, task: Task, messages: Mapping[str, Message], keep: Keep = as_it_is
        ) -> dict[str, Message | Failure]:
            last = json.loads((tmp_path / "privacy.jsonl").read_text().splitlines()[-1])
            asked.append((task, last["kind"]))
            return super().exchange(task, messages, keep)

    run(tmp_path, Reading(three_sites()), privacy=CENTRAL)
    assert asked == [
        (Task.FINGERPRINT, "planning statistics"),
        (Task.PREPARE, "case counts"),
        (Task.TRAIN, "round"),
        (Task.FINISH, "test scores"),
    ]


def test_a_budget_is_raised_in_the_first_line_of_the_ledger_and_in_the_job_or_not_at_all(tmp_path: Path) -> None:
    run(tmp_path, DirectChannel(three_sites()), rounds=9, privacy=CENTRAL)
    channel, more = DirectChannel(three_sites()), replace(CENTRAL, max_epsilon=3.0)
    with pytest.raises(LedgerError, match=r"max_epsilon is 3\.0, the ledger's is 2\.0"):
        run(tmp_path, channel, rounds=9, privacy=more, resume=True)
    assert not channel.sent
    ledger = tmp_path / "privacy.jsonl"
    ledger.write_text(ledger.read_text().replace('"max_epsilon": 2.0', '"max_epsilon": 3.0'))
    results = run(tmp_path, channel, rounds=9, privacy=more, resume=True)
    assert 2.0 < results["privacy"]["epsilon"] <= 3.0
    assert results["rounds"] == 4 + len(channel.of(Task.TRAIN, "a"))


def test_the_published_noise_says_that_it_guarantees_nothing(tmp_path: Path) -> None:
    terms = PrivacyTerms("compat_noise", clip=1000.0, sigma=1e-5, noise="seeded")
    results = run(tmp_path, DirectChannel(three_sites()), privacy=terms)
    assert results["privacy"]["epsilon"] is None
    assert results["privacy"]["statement"] == "no formal guarantee"
    # Uniform weights: the mean step of w is (1 + 2 + 4) / 3, and sigma hardly shows.
    assert torch.allclose(stored(tmp_path)["w"], INITIAL["w"] + 7 / 3, atol=1e-3)
    assert not torch.equal(stored(tmp_path)["w"], INITIAL["w"] + 7 / 3)


def test_scores_of_single_sites_are_refused_where_sites_are_covered(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites())
    with pytest.raises(FederationError, match="single sites' models, which central_client_dp does"):
        run(tmp_path, channel, privacy=CENTRAL, cross_site=True)
    assert not channel.sent


def test_directions_of_single_updates_are_not_logged_where_sites_are_covered(tmp_path: Path) -> None:
    results = run(tmp_path, DirectChannel(three_sites()), privacy=CENTRAL)
    row = json.loads((tmp_path / "rounds.jsonl").read_text())
    assert row["cosines"] in ({}, [])
    assert row["contribution"] == {}
    assert not any(results["contribution"].values())


class FirstColumnOnly(FedAvg):
    """Of `g@mr` one of two rows travels, of `g@ct` none."""

    def payload(self, state: State, site: Participant) -> Payload:
        whole = super().payload(state, site)
        rows = {name: (1,) if name == "g@mr" else () for name in whole.tensors if name != "w"}
        return Payload(take_rows(whole.tensors, rows), rows=rows)

    def aggregate(self, state: State, updates: Mapping[str, Update]) -> State:
        return replace(state, record={"sent": {site: sorted(u.delta) for site, u in updates.items()}})


def test_only_the_rows_of_a_payload_come_back(tmp_path: Path) -> None:
    channel = DirectChannel(three_sites())
    run(tmp_path, channel, FirstColumnOnly())
    (train,) = channel.of(Task.TRAIN, "a")
    assert train.meta["rows"] == {"g@mr": [1]}
    assert train.tensors["g@mr"].tolist() == [20.0]
    (finish,) = channel.of(Task.FINISH, "c")
    assert finish.meta["rows"] == {"g@ct": []}
    _, meta = load_tensors(tmp_path / "state.safetensors")
    assert meta["record"]["sent"] == {"a": ["g@mr", "w"], "b": ["g@mr", "w"], "c": ["w"]}


def test_an_update_with_rows_that_were_not_asked_for_is_refused(tmp_path: Path) -> None:
    def whole(answer: Message) -> Message:
        return replace(answer, tensors={**answer.tensors, "g@mr": torch.ones(2)})

    with pytest.raises(FederationError, match=r"g@mr"):
        run(tmp_path, DirectChannel(three_sites(), {(Task.TRAIN, "a", 0): whole}), FirstColumnOnly())
