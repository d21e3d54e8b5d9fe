"""A site on a tiny generated data set: what it sends, what it keeps, and that a restart changes nothing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcmt.algorithms.base import Algorithm, LocalStep
from fedcmt.algorithms.fedavg import FedAvg
from fedcmt.algorithms.fedcmt import FedCMT
from fedcmt.config import ConfigError, ContributionConfig, OptimizerConfig, ServerConfig, SiteConfig
from fedcmt.data.checks import DatasetError
from fedcmt.federation import Federation
from fedcmt.inprocess import InProcessChannel
from fedcmt.json_file import read_json, write_json
from fedcmt.messages import Message, Task
from fedcmt.nnunet.planner import FederatedPlanner
from fedcmt.nnunet.teacher import Teacher
from fedcmt.params import ParameterError, Params, load_tensors, norm
from fedcmt.privacy.egress import PersonalTensorError
from fedcmt.privacy.ledger import BudgetExceeded, LedgerError
from fedcmt.privacy.site_half import PrivacyError
from fedcmt.session import Aborted, DivergedError
from fedcmt.site import Site
from tests.tiny import DATASET, DATASET_ID, PLANNING, first_payload

CONFIG = SiteConfig(
    DATASET_ID, "MR", local_steps=2, val_batches=1, optimizer=OptimizerConfig("AdamW", lr=1e-2), mirroring=False
)


def prepared(
    folder: Path,
    algorithm: Algorithm,
    name: str = "north",
    config: SiteConfig = CONFIG,
    num_rounds: int = 2,
    schedule_rounds: int = 2,
    privacy: dict[str, Any] | None = None,
    resume: bool = False,
) -> tuple[Site, Params]:
    """A site ready to train, and the payload of round 0."""
    site = Site(name, config, algorithm, folder)
    rounds = {"num_rounds": num_rounds, "schedule_rounds": schedule_rounds, "resume": resume}
    return site, first_payload(site, algorithm, name=name, privacy=privacy, **rounds)


def added(payload: Params, update: Params) -> Params:
    return {name: payload[name] + update[name] for name in payload}


def test_an_update_holds_what_was_received_and_nothing_personal(tiny_folders: Path) -> None:
    site, payload = prepared(tiny_folders / "site", FedCMT())
    answer = site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    assert set(answer.tensors) == set(payload)
    assert not any(name.startswith("decoder.") for name in answer.tensors)
    assert {name for name in payload if "@" in name} == {
        "encoder.stages.0.0.convs.0.conv.weight@mr.flair",
        "encoder.stages.0.0.convs.0.conv.weight@mr.t2",
        "encoder.stages.0.0.convs.0.conv.bias@mr",
        "encoder.stages.0.0.convs.0.norm.weight@mr",
        "encoder.stages.0.0.convs.0.norm.bias@mr",
    }
    assert any(bool(tensor.abs().max() > 0) for tensor in answer.tensors.values())


def test_received_plus_update_is_the_model_on_disk(tiny_folders: Path) -> None:
    site, payload = prepared(tiny_folders / "site", FedAvg())
    answer = site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    last, _ = load_tensors(tiny_folders / "site" / "last.safetensors")
    for name, tensor in added(payload, answer.tensors).items():
        torch.testing.assert_close(last[f"network/{name}"], tensor)


def test_a_restarted_site_goes_on_to_the_bit(tiny_folders: Path) -> None:
    steady, payload = prepared(tiny_folders / "steady", FedCMT())
    first = steady.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    second = steady.handle(Task.TRAIN, Message({"round": 1, "frozen": []}, added(payload, first.tensors)))
    stopped, _ = prepared(tiny_folders / "stopped", FedCMT())
    again = stopped.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    restarted = Site("north", CONFIG, FedCMT(), tiny_folders / "stopped")
    other = restarted.handle(Task.TRAIN, Message({"round": 1, "frozen": []}, added(payload, again.tensors)))
    assert all(torch.equal(second.tensors[name], other.tensors[name]) for name in payload)
    assert second.meta["metrics"] == other.meta["metrics"]
    reports = [site.handle(Task.FINISH, Message({})).meta["report"] for site in (steady, restarted)]
    for key in ("bytes_sent", "bytes_received"):  # since the run began, not since the restart
        assert reports[0][key] == reports[1][key] > 0


class Clock(FedAvg):
    """Notes what the local loss is told of time."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, int]] = set()

    def local_loss(self, loss: torch.Tensor, step: LocalStep) -> torch.Tensor:
        self.seen.add((step.round_idx, step.num_rounds))
        return loss


def test_schedules_run_over_the_rounds_they_are_made_for(tiny_folders: Path) -> None:
    poly = replace(CONFIG, optimizer=OptimizerConfig("AdamW", lr=1e-2, schedule="poly"))  # 2 steps a round
    clock, rates = Clock(), []
    site, payload = prepared(tiny_folders / "site", clock, config=poly, num_rounds=4, schedule_rounds=2)
    site._report = lambda tag, value, _: rates.append(value) if tag == "learning_rate" else None
    for round_idx in range(3):
        site.handle(Task.TRAIN, Message({"round": round_idx, "frozen": []}, payload))
    assert rates == pytest.approx([1e-2 * (1 - 1 / 4) ** 0.9, 1e-2 * (1 - 3 / 4) ** 0.9, 1e-2 * (1 - 3 / 4) ** 0.9])
    assert clock.seen == {(0, 2), (1, 2), (2, 2)}


def test_sites_in_one_process_do_not_disturb_each_other(tiny_folders: Path) -> None:
    alone, payload = prepared(tiny_folders / "alone", FedAvg())
    expected = alone.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    site, _ = prepared(tiny_folders / "site", FedAvg())
    neighbour, _ = prepared(tiny_folders / "neighbour", FedAvg(), name="south")
    neighbour.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    torch.rand(7)
    answer = site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    assert all(torch.equal(expected.tensors[name], answer.tensors[name]) for name in payload)


def test_a_payload_that_does_not_fit_changes_nothing(tiny_folders: Path) -> None:
    site, payload = prepared(tiny_folders / "site", FedAvg())
    name = next(iter(payload))
    wrong = [
        {k: v for k, v in payload.items() if k != name},
        {**payload, "stranger": torch.ones(1)},
        {**payload, name: payload[name][:1]},
    ]
    for tensors in wrong:
        with pytest.raises(ParameterError):
            site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, tensors))
    _, meta = load_tensors(tiny_folders / "site" / "last.safetensors")
    assert meta["round"] == -1


def test_a_personal_tensor_in_an_answer_is_refused(tiny_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, payload = prepared(tiny_folders / "site", FedCMT())
    rows = (tiny_folders / "site" / "egress.jsonl").read_text()
    leak = {"decoder.seg_layers.0.weight": torch.ones(1)}
    monkeypatch.setattr(FedCMT, "local_extras", lambda self, network: leak)
    with pytest.raises(PersonalTensorError, match=r"decoder\.seg_layers\.0\.weight"):
        site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    assert (tiny_folders / "site" / "egress.jsonl").read_text() == rows


def test_a_diverged_round_is_an_error_and_leaves_the_model_of_the_round_before(tiny_folders: Path) -> None:
    site, payload = prepared(tiny_folders / "site", FedCMT())
    site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    before = (tiny_folders / "site" / "last.safetensors").read_bytes()
    poisoned = {name: torch.full_like(tensor, float("nan")) for name, tensor in payload.items()}
    with pytest.raises(DivergedError, match=r"round 2 is not finite"):
        site.handle(Task.TRAIN, Message({"round": 1, "frozen": []}, poisoned))
    assert (tiny_folders / "site" / "last.safetensors").read_bytes() == before
    answer = site.handle(Task.TRAIN, Message({"round": 1, "frozen": []}, payload))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in answer.tensors.values())


def test_an_abort_stops_between_steps(tiny_folders: Path) -> None:
    site, payload = prepared(tiny_folders / "site", FedAvg())
    with pytest.raises(Aborted, match="round 1 at step 1"):
        site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload), stop=lambda: True)


def test_the_exported_folder_holds_the_last_model_in_every_alias(tiny_folders: Path) -> None:
    site, payload = prepared(tiny_folders / "site", FedCMT())
    site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    report = site.handle(Task.FINISH, Message({})).meta["report"]
    weights = torch.load(
        tiny_folders / "results" / report["model_folder"] / "fold_all" / "checkpoint_final.pth", weights_only=True
    )["network_weights"]
    last, _ = load_tensors(tiny_folders / "site" / "last.safetensors")
    for name in (n.removeprefix("network/") for n in last if n.startswith("network/encoder.")):
        assert torch.equal(weights[name], last[f"network/{name}"])
        assert torch.equal(weights[f"decoder.{name}"], last[f"network/{name}"])
    assert report["test"]["cases"] == 1
    assert report["validation"]["cases"] == 1
    assert "common" not in report


def test_an_empty_folder_of_test_images_is_none(
    tiny_raw: Path, tiny_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(tiny_raw, tmp_path / "own_raw")
    monkeypatch.setenv("nnUNet_raw", str(own))
    for kind in ("images", "labels"):
        shutil.rmtree(own / DATASET / f"{kind}Ts")
        (own / DATASET / f"{kind}Ts").mkdir()
    site, payload = prepared(tiny_folders / "site", FedCMT())
    site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    assert site.handle(Task.FINISH, Message({})).meta["report"]["test"] is None


@pytest.mark.parametrize("score_common", [True, False])
def test_cases_that_all_sites_share_are_scored_apart(
    tiny_raw: Path, tiny_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score_common: bool
) -> None:
    own = shutil.copytree(tiny_raw, tmp_path / "own_raw")
    monkeypatch.setenv("nnUNet_raw", str(own))
    dataset = own / DATASET
    for kind in ("images", "labels"):
        shutil.copytree(dataset / f"{kind}Ts", dataset / f"{kind}Common")
    site, payload = prepared(tiny_folders / "site", FedCMT(), config=replace(CONFIG, score_common=score_common))
    site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    report = site.handle(Task.FINISH, Message({})).meta["report"]
    assert report.get("common") == (report["test"] if score_common else None)
    predictions = tiny_folders / "results" / report["model_folder"] / "predictions"
    assert sorted(p.name for p in predictions.iterdir()) == ["imagesCommon"] * score_common + ["imagesTr", "imagesTs"]


def test_what_is_frozen_stays_as_received_and_is_not_sent(tiny_folders: Path) -> None:
    site, payload = prepared(tiny_folders / "site", FedCMT())
    frozen = sorted(name for name in payload if "@" not in name)
    answer = site.handle(Task.TRAIN, Message({"round": 0, "frozen": frozen}, payload))
    assert set(answer.tensors) == {name for name in payload if "@" in name}
    last, _ = load_tensors(tiny_folders / "site" / "last.safetensors")
    assert all(torch.equal(last[f"network/{name}"], payload[name]) for name in frozen)
    assert any(bool(tensor.abs().max() > 0) for tensor in answer.tensors.values())


def test_a_slot_stays_as_received_while_another_of_its_parameter_trains(tiny_folders: Path) -> None:
    """A newcomer in its warm start may have a sequence that the federation knows and one that it does not."""
    site, payload = prepared(tiny_folders / "site", FedCMT())
    weight = "encoder.stages.0.0.convs.0.conv.weight"
    frozen = sorted(payload.keys() - {f"{weight}@mr.t2"})
    answer = site.handle(Task.TRAIN, Message({"round": 0, "frozen": frozen}, payload))
    assert set(answer.tensors) == {f"{weight}@mr.t2"}
    flair, t2 = load_tensors(tiny_folders / "site" / "last.safetensors")[0][f"network/{weight}"].unbind(dim=1)
    assert torch.equal(flair, payload[f"{weight}@mr.flair"])
    torch.testing.assert_close(t2, payload[f"{weight}@mr.t2"] + answer.tensors[f"{weight}@mr.t2"])
    assert float(answer.tensors[f"{weight}@mr.t2"].abs().max()) > 1e-3
    answer = site.handle(Task.TRAIN, Message({"round": 1, "frozen": []}, payload))
    assert float(answer.tensors[f"{weight}@mr.flair"].abs().max()) > 1e-3  # the warm start is over


@pytest.mark.parametrize("first_round", [0, 1])
def test_a_site_s_first_round_distils_nothing_nor_does_the_first_step_of_the_next(
    first_round: int, tiny_folders: Path
) -> None:
    terms: list[float] = []

    class Spy(FedCMT):
        def local_loss(self, loss: torch.Tensor, step: LocalStep) -> torch.Tensor:
            total = super().local_loss(loss, step)
            terms.append(float((total - loss).detach()))
            return total

    site, payload = prepared(tiny_folders / "site", Spy())
    for round_idx in (first_round, first_round + 1):
        site.handle(Task.TRAIN, Message({"round": round_idx, "frozen": []}, payload))
    assert terms[:2] == [0, 0]  # nothing yet that could teach
    assert terms[2] == pytest.approx(0, abs=1e-5)  # student and teacher are one
    assert terms[3] > 1e-5


def test_distillation_costs_a_step_one_forward_pass_and_a_round_one_copy(
    tiny_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            events.append(name)
            return method(*args)

        return call

    monkeypatch.setattr(Teacher, "__init__", counted("build", Teacher.__init__))
    monkeypatch.setattr(Teacher, "follow", counted("copy", Teacher.follow))
    monkeypatch.setattr(Teacher, "logits", counted("forward", Teacher.logits))
    site, payload = prepared(tiny_folders / "site", FedCMT(), num_rounds=3, schedule_rounds=3)
    for round_idx in range(3):
        site.handle(Task.TRAIN, Message({"round": round_idx, "frozen": []}, payload))
    steps = ["forward"] * CONFIG.local_steps
    assert events == ["build", "copy", *steps, "copy", *steps]  # none in round 0


@pytest.fixture
def classified(tiny_folders: Path, tiny_raw: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data set of `tests.tiny` in a raw folder that a test may change, with two classes; returns its folder."""
    raw = tiny_folders / "raw"
    shutil.copytree(tiny_raw, raw)
    monkeypatch.setenv("nnUNet_raw", str(raw))
    folder = raw / DATASET
    cases = sorted(path.name.removesuffix("_0000.nii.gz") for path in folder.glob("images*/*_0000.nii.gz"))
    write_json(folder / "classes.json", {"classes": ["old", "new"], "cases": {c: i % 2 for i, c in enumerate(cases)}})
    return folder


CLASSIFIES = replace(CONFIG, task="classification")


@pytest.mark.parametrize(
    ("names", "config", "complaint"),
    [
        (["new", "old"], CLASSIFIES, r"list of classes \['old', 'new'\], now it is to be \['new', 'old'\]"),
        (["old", "newer"], CLASSIFIES, r"list of classes \['old', 'new'\], now it is to be \['old', 'newer'\]"),
        (["old", "new"], CONFIG, "task classification, now it is to be segmentation"),
    ],
    ids=["other order", "other name", "other task"],
)
def test_outputs_that_would_mean_something_else_are_refused_on_resuming(
    tiny_folders: Path, classified: Path, names: list[str], config: SiteConfig, complaint: str
) -> None:
    site, payload = prepared(tiny_folders / "site", FedCMT(), config=CLASSIFIES)
    site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    site.close()
    before = state_on_disk(tiny_folders / "site")
    prepared(tiny_folders / "site", FedCMT(), config=CLASSIFIES, resume=True)[0].close()
    content = read_json(classified / "classes.json")
    write_json(classified / "classes.json", {**content, "classes": names})
    with pytest.raises(ValueError, match=rf"site 'north': .*site holds the state of a model for {complaint}"):
        prepared(tiny_folders / "site", FedCMT(), config=config, resume=True)
    assert state_on_disk(tiny_folders / "site") == before


def state_on_disk(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def evaluated(site: Site, payload: Params, round_idx: int = 0) -> Message:
    return site.handle(Task.EVALUATE, Message({"round": round_idx}, payload))


@pytest.mark.parametrize("algorithm", [FedAvg, FedCMT])
def test_scoring_a_model_leaves_the_site_as_it_was_to_the_bit(algorithm: type[Algorithm], tiny_folders: Path) -> None:
    asked, payload = prepared(tiny_folders / "asked", algorithm())
    spared, _ = prepared(tiny_folders / "spared", algorithm())
    for site in (asked, spared):
        site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    before, random_before = state_on_disk(tiny_folders / "asked"), torch.get_rng_state()
    other = {name: tensor + 0.1 for name, tensor in payload.items()}
    evaluated(asked, other)
    evaluated(asked, payload)
    assert state_on_disk(tiny_folders / "asked") == before
    assert torch.equal(torch.get_rng_state(), random_before)
    answers = [site.handle(Task.TRAIN, Message({"round": 1, "frozen": []}, payload)) for site in (asked, spared)]
    assert all(torch.equal(answers[0].tensors[name], answers[1].tensors[name]) for name in payload)
    assert answers[0].meta["metrics"] == answers[1].meta["metrics"]
    left, right = (load_tensors(tiny_folders / name / "last.safetensors") for name in ("asked", "spared"))
    # Network, optimiser and random state.
    assert all(torch.equal(left[0][name], tensor) for name, tensor in right[0].items())
    assert left[1] == right[1]


def test_scoring_leaves_the_model_that_the_site_ends_with(tiny_folders: Path) -> None:
    site, payload = prepared(tiny_folders / "site", FedCMT())
    site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    evaluated(site, {name: tensor + 0.5 for name, tensor in payload.items()})
    report = site.handle(Task.FINISH, Message({})).meta["report"]
    file = tiny_folders / "results" / report["model_folder"] / "fold_all" / "checkpoint_final.pth"
    weights = torch.load(file, weights_only=True)["network_weights"]
    last, _ = load_tensors(tiny_folders / "site" / "last.safetensors")
    exported = {n: t for n, t in last.items() if n.startswith("network/encoder.")}
    assert all(torch.equal(weights[name.removeprefix("network/")], tensor) for name, tensor in exported.items())


def test_a_score_is_the_one_that_training_gives_the_received_model(tiny_folders: Path) -> None:
    site, payload = prepared(tiny_folders / "site", FedAvg())
    trained = site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    assert evaluated(site, payload).meta["score"] == trained.meta["metrics"]["val_dice_received"]
    aggregate = added(payload, trained.tensors)
    assert evaluated(site, aggregate).meta["score"] == trained.meta["metrics"]["val_dice_trained"]


def test_an_evaluated_model_that_does_not_fit_is_refused_and_changes_nothing(tiny_folders: Path) -> None:
    site, payload = prepared(tiny_folders / "site", FedCMT())
    trained = site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    before = evaluated(site, payload)
    name = next(iter(payload))
    for tensors in ({k: v for k, v in payload.items() if k != name}, {**payload, "stranger": torch.ones(1)}):
        with pytest.raises(ParameterError):
            evaluated(site, tensors)
    assert evaluated(site, payload) == before
    assert set(trained.tensors) == set(payload)


def test_scoring_sends_no_tensor_and_is_in_the_ledger(tiny_folders: Path) -> None:
    site, payload = prepared(tiny_folders / "site", FedCMT())
    site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    answer = evaluated(site, payload, round_idx=4)
    assert answer.tensors == answer.extras == {}
    row = json.loads((tiny_folders / "site" / "egress.jsonl").read_text().splitlines()[-1])
    assert (row["task"], row["round"], row["tensors"], row["tensor_bytes"]) == ("evaluate", 4, {}, 0)
    assert row["meta_keys"] == ["outputs", "round", "score", "site", "task"]


def test_a_site_says_what_its_outputs_mean_only_if_their_layers_travel(tiny_folders: Path) -> None:
    whole, whole_payload = prepared(tiny_folders / "whole", FedAvg())
    own, own_payload = prepared(tiny_folders / "own", FedCMT())
    outputs = evaluated(whole, whole_payload).meta["outputs"]
    assert outputs["task"] == "segmentation"
    assert "background" in outputs["labels"]
    assert evaluated(own, own_payload).meta["outputs"] is None


def test_scoring_each_other_s_models_lets_nothing_personal_leave(tiny_folders: Path) -> None:
    sites = {name: Site(name, CONFIG, FedCMT(), tiny_folders / name) for name in ("north", "south")}
    config = ServerConfig(1, planning=PLANNING, contribution=ContributionConfig(tier=2), cross_site=True)
    federation = Federation(
        FedCMT(), FederatedPlanner(PLANNING, seed=5), config, job="job", folder=tiny_folders / "server"
    )
    results = federation.run(InProcessChannel(sites), list(sites))
    assert {of: sorted(row) for of, row in results["cross_site"].items()} == dict.fromkeys(sites, sorted(sites))
    assert all(score is not None for row in results["cross_site"].values() for score in row.values())
    assert results["cross_site_heads"] == dict.fromkeys(sites, "own")
    for name in sites:
        rows = [json.loads(line) for line in (tiny_folders / name / "egress.jsonl").read_text().splitlines()]
        tasks = [row["task"] for row in rows]
        # Four coalitions, then its own model and the other's.
        assert tasks == ["fingerprint", "prepare", "train", *["evaluate"] * 6, "finish"]
        assert not any(tensor.startswith("decoder.") for row in rows for tensor in row["tensors"])
        assert not any(row["tensors"] for row in rows if row["task"] == "evaluate")


def test_a_site_that_is_covered_sends_a_clipped_update_and_no_metrics(tiny_folders: Path) -> None:
    privacy = {"mode": "central_client_dp", "clip": 0.01, "noise_multiplier": 1.0}
    site, payload = prepared(tiny_folders / "site", FedAvg(), privacy=privacy)
    told: list[str] = []
    site._report = lambda tag, value, step: told.append(tag)
    answer = site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    assert norm(answer.tensors) == pytest.approx(0.01, rel=1e-5)
    assert answer.meta["metrics"] == {}
    assert told == ["learning_rate"]


CENTRAL = {"mode": "central_client_dp", "clip": 0.01, "noise_multiplier": 4.0, "max_epsilon": 1.0}
"""One round costs 0.926, two 1.356."""
INSTANCE = {"mode": "instance_dp", "noise_multiplier": 1.0, "expected_batch": 2, "delta": 1e-3, "noise": "seeded"}


def test_a_covered_site_counts_its_rounds_and_refuses_the_one_that_is_too_much(
    tmp_path: Path, tiny_folders: Path
) -> None:
    site, payload = prepared(tmp_path / "site", FedAvg(), privacy=CENTRAL)
    site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    before = state_on_disk(tmp_path / "site")
    with pytest.raises(BudgetExceeded, match=r"round 2 would bring epsilon of site 'north' to 1\.356"):
        site.handle(Task.TRAIN, Message({"round": 1, "frozen": []}, payload))
    assert state_on_disk(tmp_path / "site") == before


def test_a_server_that_begins_anew_cannot_make_a_site_forget_what_it_spent(tiny_folders: Path) -> None:
    site, payload = prepared(tiny_folders / "site", FedAvg(), privacy=CENTRAL)
    site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    folder, plans = tiny_folders / "site", json.loads((tiny_folders / "site" / "prepared.json").read_text())["plans"]
    before = {path.name: path.read_bytes() for path in (*folder.glob("*.safetensors"), folder / "privacy.jsonl")}
    again = {"plans": plans, "num_rounds": 2, "schedule_rounds": 2, "resume": False}
    with pytest.raises(LedgerError, match=r"site 'north': the server begins a new federation, and .* has 1 rounds"):
        site.handle(Task.PREPARE, Message(again))
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not list(folder.glob("privacy_earlier*"))


@pytest.mark.parametrize("privacy", [CENTRAL, INSTANCE], ids=lambda terms: str(terms["mode"]))
def test_a_site_s_own_ledger_has_all_that_it_released(tiny_folders: Path, privacy: dict[str, Any]) -> None:
    site, payload = prepared(tiny_folders / "site", FedAvg(), privacy=privacy)
    site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    site.handle(Task.FINISH, Message({}, payload))
    rows = [json.loads(line) for line in (tiny_folders / "site" / "privacy.jsonl").read_text().splitlines()[1:]]
    assert [(row["kind"], row["covered"], row["site"]) for row in rows] == [
        ("planning statistics", False, "north"),
        ("case counts", False, "north"),
        ("round", True, "north"),
        ("test scores", False, "north"),
    ]
    assert rows[-1]["epsilon_after"] == rows[-2]["epsilon_after"] > 0


@pytest.mark.parametrize(("fold", "cases"), [(0, 4), ("all", 5)])
def test_more_cases_a_step_than_there_are_is_refused_before_anything_is_told(
    tiny_folders: Path, fold: Any, cases: int
) -> None:
    """Five cases, of which nnU-Net's fold 0 keeps one back."""
    config = replace(CONFIG, fold=fold)
    _, enough = prepared(
        tiny_folders / "enough", FedAvg(), config=config, privacy={**INSTANCE, "expected_batch": cases}
    )
    assert enough
    more = {**INSTANCE, "expected_batch": cases + 1}
    with pytest.raises(PrivacyError, match=rf"expected_batch is {cases + 1}, expected at most {cases}"):
        prepared(tiny_folders / "more", FedAvg(), config=config, privacy=more)
    assert not (tiny_folders / "more" / "joined.json").exists()
    assert not (tiny_folders / "more" / "egress.jsonl").exists()


def test_cases_of_a_data_set_s_own_split_are_counted(
    tiny_raw: Path, tiny_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(tiny_raw, tmp_path / "own_raw")
    monkeypatch.setenv("nnUNet_raw", str(own))
    cases = sorted({path.name.rsplit("_", 1)[0] for path in (own / DATASET / "imagesTr").iterdir()})
    split = [{"train": cases[:3], "val": cases[3:]}]
    (own / DATASET / "splits_final.json").write_text(json.dumps(split))
    config = replace(CONFIG, fold=0)
    with pytest.raises(PrivacyError, match=r"delta is 0\.4, expected below 1 / 3"):
        prepared(tiny_folders / "site", FedAvg(), config=config, privacy={**INSTANCE, "delta": 0.4})


def test_a_split_of_other_cases_is_refused_before_anything_is_preprocessed(
    tiny_raw: Path, tiny_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(tiny_raw, tmp_path / "own_raw")
    monkeypatch.setenv("nnUNet_raw", str(own))
    split = own / DATASET / "splits_final.json"
    split.write_text(json.dumps([{"train": ["nobody"], "val": []}]))
    with pytest.raises(DatasetError, match=rf"{split}: names 1 cases that imagesTr does not hold: \['nobody'\]"):
        prepared(tiny_folders / "site", FedAvg(), config=replace(CONFIG, fold=0))
    assert not (tiny_folders / "site" / "joined.json").exists()


def test_a_job_s_name_that_leads_out_of_the_site_s_folders_is_refused(tiny_folders: Path) -> None:
    site = Site("north", CONFIG, FedAvg(), tiny_folders / "site")
    with pytest.raises(ConfigError, match=r"the server's job: name is '\.\./evil', expected the job's name"):
        site.handle(Task.FINGERPRINT, Message({"job": "../evil", "planning": PLANNING}))
    assert not (tiny_folders / "site" / "joined.json").exists()


def test_under_the_published_noise_no_step_leaves_the_ball(tiny_folders: Path) -> None:
    terms = {"mode": "compat_noise", "clip": 0.02, "sigma": 0.0}
    site, payload = prepared(tiny_folders / "site", FedAvg(), privacy=terms)
    answer = site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    assert 0 < norm(answer.tensors) <= 0.02 * (1 + 1e-5)
    assert "loss" in answer.meta["metrics"]


def test_a_site_forgets_its_optimizers_state_where_it_is_told_to(tiny_folders: Path) -> None:
    kept, payload = prepared(tiny_folders / "kept", FedAvg())
    reset = replace(CONFIG, optimizer=replace(CONFIG.optimizer, reset=True))
    forgets, _ = prepared(tiny_folders / "forgets", FedAvg(), config=reset)
    updates = []
    for site in (kept, forgets):
        for round_idx in range(2):
            answer = site.handle(Task.TRAIN, Message({"round": round_idx, "frozen": []}, payload))
            updates.append(answer.tensors)
    first_kept, second_kept, first_forgets, second_forgets = updates
    assert all(torch.equal(first_kept[name], first_forgets[name]) for name in first_kept)
    assert not all(torch.equal(second_kept[name], second_forgets[name]) for name in second_kept)


def test_rows_that_do_not_travel_stay_the_site_s_own(tiny_folders: Path) -> None:
    site, payload = prepared(tiny_folders / "site", FedAvg())
    site.handle(Task.TRAIN, Message({"round": 0, "frozen": []}, payload))
    before, _ = load_tensors(tiny_folders / "site" / "last.safetensors")
    name = next(name for name, tensor in payload.items() if tensor.dim() == 5 and len(tensor) > 2)
    rows = {name: [2, 0]}
    sent = {**payload, name: torch.full_like(payload[name][:2], 0.25)}
    answer = site.handle(Task.TRAIN, Message({"round": 1, "frozen": [], "rows": rows}, sent))
    after, _ = load_tensors(tiny_folders / "site" / "last.safetensors")
    own = [row for row in range(len(payload[name])) if row not in (0, 2)]
    trained = after[f"network/{name}"]
    assert answer.tensors[name].shape == sent[name].shape
    assert torch.allclose(answer.tensors[name], trained[[2, 0]] - 0.25, atol=1e-6)
    moved = trained[own] - before[f"network/{name}"][own]
    assert 0 < float(moved.abs().max()) < 0.2  # trained on from its own values, not from others'


def test_a_tensor_of_which_no_row_travels_is_neither_received_nor_sent(tiny_folders: Path) -> None:
    site, payload = prepared(tiny_folders / "site", FedAvg())
    name = next(name for name, tensor in payload.items() if tensor.dim() == 5)
    rest = {key: tensor for key, tensor in payload.items() if key != name}
    answer = site.handle(Task.TRAIN, Message({"round": 0, "frozen": [], "rows": {name: []}}, rest))
    assert set(answer.tensors) == set(rest)
