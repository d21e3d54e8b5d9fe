"""Whole jobs under privacy terms, in this process: what they report, what their ledgers hold, and that a restart
changes neither."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcmt.config import JobConfig, OptimizerConfig, ServerConfig, SiteConfig
from fedcmt.data.phantoms import make_brain_mr
from fedcmt.federation import FederationError
from fedcmt.inprocess import run_in_process
from fedcmt.params import load_tensors
from fedcmt.privacy.terms import PrivacyTerms
from fedcmt.workspace import THREADS_VARIABLE, environment

SITE = SiteConfig(
    811,
    "MR",
    fold="all",
    local_steps=2,
    optimizer=OptimizerConfig("SGD", lr=0.01, momentum=0.9),
    val_batches=1,
    mirroring=False,
    device="cpu",
)
SMALL = {"base_features": 4, "max_features": 16, "max_stages": 3, "max_patch_size": [16, 16, 24], "batch_size": 2}
THREE_D: dict[str, Any] = {"mode": "architecture", **SMALL, "extra_stem_convolution": True}
CENTRAL = PrivacyTerms("central_client_dp", clip=0.5, noise_multiplier=2.0, noise="seeded")
INSTANCE = PrivacyTerms("instance_dp", clip=1.0, noise_multiplier=1.0, expected_batch=2, delta=1e-2, noise="seeded")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private")
    for name, num_train in (("Dataset811_North", 5), ("Dataset812_South", 7)):
        make_brain_mr(
            folder / "raw" / name,
            num_train=num_train,
            num_test=1,
            seed=num_train,
            style="site_a",
            channels=("FLAIR", "T1"),
            shape_vox=(24, 28, 20),
        )
    return folder


def run(
    root: Path,
    name: str,
    terms: PrivacyTerms,
    *,
    algorithm: str = "fedavg.FedAvg",
    planning: dict[str, Any] | None = None,
    rounds: int = 2,
    resume: bool = False,
) -> dict[str, Any]:
    """A job of two sites of 5 and 7 cases."""
    server = ServerConfig(rounds, planning=planning or THREE_D, seed=5, schedule_rounds=2, privacy=terms)
    sites = {"north": SITE, "south": SiteConfig(**{**vars(SITE), "dataset_id": 812})}
    spec = {"path": f"fedcmt.algorithms.{algorithm}", "args": {}}
    variables = {
        "nnUNet_raw": str(root / "raw"),
        "nnUNet_preprocessed": str(root / "preprocessed"),
        "nnUNet_results": str(root / name / "results"),
        THREADS_VARIABLE: "1",
    }
    with environment(variables):
        return run_in_process(JobConfig(root / "job", name, server, spec, sites), root / name, resume=resume)


def ledger(folder: Path) -> list[dict[str, Any]]:
    """The releases with noise in a ledger."""
    rows = [json.loads(line) for line in (folder / "privacy.jsonl").read_text().splitlines()[1:]]
    return [row for row in rows if row["covered"]]


def state(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_tensors(root / name / "server" / "state.safetensors")[0]


def test_a_job_that_protects_cases_reports_the_epsilon_of_the_site_with_fewer(root: Path) -> None:
    results = run(root, "instance", INSTANCE)
    north, south = (ledger(root / "instance" / "sites" / site) for site in ("north", "south"))
    assert [row["sampling_rate"] for row in (north[-1], south[-1])] == [2 / 5, 2 / 7]
    assert [row["count"] for row in north] == [2, 2]
    assert results["privacy"]["epsilon"] == pytest.approx(north[-1]["epsilon_after"])
    assert north[-1]["epsilon_after"] > south[-1]["epsilon_after"]
    assert results["privacy"]["protects"] == "training case"


def test_no_metric_of_a_round_reaches_the_server(root: Path) -> None:
    run(root, "quiet", CENTRAL)
    rows = [json.loads(line) for line in (root / "quiet" / "server" / "rounds.jsonl").read_text().splitlines()]
    assert [row["sites"] for row in rows] == [{"north": {}, "south": {}}] * 2
    sent = [json.loads(line) for line in (root / "quiet/sites/north/egress.jsonl").read_text().splitlines()]
    assert all(row["norm"] <= 0.5 + 1e-4 for row in sent if row["task"] == "train")


@pytest.mark.parametrize("terms", [CENTRAL, INSTANCE], ids=lambda terms: terms.mode)
def test_a_job_that_is_resumed_ends_with_the_ledger_and_the_weights_of_one_that_is_not(
    root: Path, terms: PrivacyTerms
) -> None:
    whole, parts = f"whole_{terms.mode}", f"parts_{terms.mode}"
    told = run(root, whole, terms)["privacy"]
    run(root, parts, terms, rounds=1)
    resumed = run(root, parts, terms, resume=True)["privacy"]
    assert resumed["epsilon"] == told["epsilon"]
    assert all(torch.equal(state(root, parts)[name], tensor) for name, tensor in state(root, whole).items())
    rounds = [row["round"] for row in ledger(root / parts / "server")]
    assert sorted(set(rounds)) == [0, 1]


@pytest.mark.parametrize("algorithm", ["fedcmt.FedCMT", "fedper.FedPer"])
@pytest.mark.parametrize("terms", [CENTRAL, INSTANCE], ids=lambda terms: terms.mode)
def test_other_algorithms_train_under_the_same_terms(root: Path, algorithm: str, terms: PrivacyTerms) -> None:
    name = f"{algorithm.split('.')[1]}_{terms.mode}"
    results = run(root, name, terms, algorithm=algorithm, rounds=1)
    assert results["privacy"]["epsilon"] > 0
    assert set(results["sites"]) == {"north", "south"}


def test_fedcmt_is_refused_where_the_server_may_see_sums_only(root: Path) -> None:
    terms = PrivacyTerms("distributed_client_dp", noise_multiplier=1.0)
    with pytest.raises(ValueError, match="FedCMT's server works on single"):
        run(root, "refused", terms, algorithm="fedcmt.FedCMT")
    assert not (root / "refused" / "sites" / "north" / "egress.jsonl").exists()


def test_a_budget_ends_training_and_the_models_are_exported(root: Path) -> None:
    terms = PrivacyTerms("central_client_dp", clip=0.5, noise_multiplier=2.0, max_epsilon=2.5, noise="seeded")
    results = run(root, "budget", terms, rounds=3)
    assert "round 2 would bring epsilon" in results["privacy"]["stopped"]
    assert results["privacy"]["epsilon"] <= 2.5
    assert results["sites"]["north"]["steps"] == 2
    with pytest.raises(FederationError, match="does not allow a single round"):
        run(root, "no_budget", PrivacyTerms(**{**terms.to_dict(), "max_epsilon": 0.5}))


def test_munet_trains_on_slices_with_the_published_noise(root: Path) -> None:
    planning = {"mode": "consensus", "configuration": "2d", "network": "MUNet", "base_features": 4, "max_stages": 2}
    terms = PrivacyTerms("compat_noise", clip=1000.0, sigma=1e-5, noise="seeded")
    results = run(root, "munet", terms, planning={**planning, "batch_size": 2}, rounds=1)
    assert results["privacy"] == {
        "mode": "compat_noise",
        "protects": None,
        "epsilon": None,
        "statement": "no formal guarantee",
        "clip": 1000.0,
        "sigma": 1e-5,
    }
    assert results["sites"]["south"]["test"]["cases"] == 1
