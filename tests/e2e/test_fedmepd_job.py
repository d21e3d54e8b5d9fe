"""FedMEPD on a site with two sequences, one with another, and a fusion site with all four, in this process."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcmt.config import JobConfig, OptimizerConfig, ServerConfig, SiteConfig
from fedcmt.data.phantoms import make_brain_mr
from fedcmt.evaluation.tables import results_table
from fedcmt.inprocess import run_in_process
from fedcmt.params import Params, load_tensors
from fedcmt.workspace import THREADS_VARIABLE, environment

SITE = SiteConfig(
    821,
    "MR",
    fold="all",
    local_steps=2,
    optimizer=OptimizerConfig("SGD", lr=0.01),
    loss="fedmepd",
    val_batches=1,
    mirroring=False,
    score_regions={"whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": [3]},
    device="cpu",
)
SITES = {
    "pair": SITE,
    "single": replace(SITE, dataset_id=822),
    "fusion": replace(SITE, dataset_id=823, role="fusion"),
}
CHANNELS = {
    "Dataset821_Pair": ("T1ce", "FLAIR"),
    "Dataset822_Single": ("T2",),
    "Dataset823_Fusion": ("T2", "T1", "T1ce", "FLAIR"),
}
PLANNING = {
    "mode": "architecture",
    "network": "FedMEPDNet",
    "network_options": {"anchors_per_class": 2},
    "base_features": 4,
    "max_features": 8,
    "max_stages": 2,
    "max_patch_size": [16, 16, 24],
    "batch_size": 1,
}


class Runs:
    """Runs jobs on one cohort."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.results: dict[str, dict[str, Any]] = {}
        for name, channels in CHANNELS.items():
            folder, seed = root / "raw" / name, int(name[7:10])
            make_brain_mr(
                folder,
                num_train=5,
                num_test=1,
                seed=seed,
                style="site_a",
                channels=channels,
                shape_vox=(24, 28, 20),
                labels="plain",
            )

    def run(self, name: str, rounds: int = 3, *, resume: bool = False, **args: Any) -> dict[str, Any]:
        server = ServerConfig(rounds, planning=PLANNING, seed=5, schedule_rounds=3)
        settings = {"anchors_per_class": 2, "pretrain_rounds": 0, "patience": 1, **args}
        spec = {"path": "fedcmt.algorithms.fedmepd.FedMEPD", "args": settings}
        variables = {
            "nnUNet_raw": str(self.root / "raw"),
            "nnUNet_preprocessed": str(self.root / "preprocessed"),
            "nnUNet_results": str(self.root / name / "results"),
            THREADS_VARIABLE: "1",
        }
        with environment(variables):
            job = JobConfig(self.root, name, server, spec, SITES)
            self.results[name] = run_in_process(job, self.root / name, resume=resume)
        return self.results[name]

    def state(self, name: str) -> Params:
        return load_tensors(self.root / name / "server" / "state.safetensors")[0]

    def network(self, name: str, site: str) -> Params:
        tensors, _ = load_tensors(self.root / name / "sites" / site / "last.safetensors")
        return {key.removeprefix("network/"): t for key, t in tensors.items() if key.startswith("network/")}

    def sent(self, name: str, site: str) -> list[dict[str, Any]]:
        lines = (self.root / name / "sites" / site / "egress.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["task"] == "train"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("fedmepd"))
    made.run("whole")
    return made


def test_oracle_26_an_encoder_that_no_other_site_holds_is_the_fusion_site_s(runs: Runs) -> None:
    state, fusion = runs.state("whole"), runs.network("whole", "fusion")
    own = [name for name in fusion if name.startswith("encoders.T1.")]
    assert own
    assert all(torch.allclose(state[f"params/{name}"], fusion[name], atol=1e-6) for name in own)


def test_oracle_26_uploads_hold_the_site_s_own_encoders_and_the_fusion_site_trains_once_more(runs: Runs) -> None:
    for site, held in (("pair", {"FLAIR", "T1ce"}), ("single", {"T2"}), ("fusion", {"FLAIR", "T1ce", "T1", "T2"})):
        rows = runs.sent("whole", site)
        assert len(rows) == (3 if site == "fusion" else 2)
        names = {name for row in rows for name in row["tensors"]}
        assert {name.split(".")[1] for name in names if name.startswith("encoders.")} == held
        assert not any(name.startswith(("auxiliary", "calibration")) for name in names)
    anchors = [name for name in runs.sent("whole", "fusion")[-1]["tensors"] if "anchors" in name]
    assert anchors == ["extra:anchors.1", "extra:anchors.2"]


def test_sites_calibrate_by_the_fusion_site_s_anchors(runs: Runs) -> None:
    pair, single = (runs.network("whole", site) for site in ("pair", "single"))
    assert pair["anchors.1"].abs().sum() > 0
    assert torch.equal(pair["anchors.2"], single["anchors.2"])
    assert not any(name.startswith(("anchors", "calibration")) for name in runs.network("whole", "fusion"))


def test_oracle_26_a_personal_filter_is_no_longer_sent_and_differs_and_encoders_stay_common(runs: Runs) -> None:
    runs.run("personal", patience=0)
    names = {name for row in runs.sent("personal", "pair") for name in row["tensors"]}
    assert names
    assert not any(name.startswith("decoder.") for name in names)
    pair, single = (runs.network("personal", site) for site in ("pair", "single"))
    assert not torch.equal(pair["decoder.head.weight"], single["decoder.head.weight"])


def test_plain_labels_are_trained_on_and_nested_regions_scored_in_results_and_their_table(runs: Runs) -> None:
    results = runs.results["whole"]
    for report in results["sites"].values():
        dice = report["test"]["dice"]
        assert list(dice) == ["whole_tumor", "tumor_core", "enhancing_tumor"]
        assert report["test"]["mean_dice"] == pytest.approx(sum(dice.values()) / 3)
        model = runs.root / "whole" / "results" / report["model_folder"]
        assert list(json.loads((model / "dataset.json").read_text())["labels"].values()) == [0, 1, 2, 3]
    head = next(line for line in results_table(results).splitlines() if "mean Dice" in line)
    assert head.split()[2:7] == ["whole_tumor", "tumor_core", "enhancing_tumor", "mean", "Dice"]


def test_a_run_that_is_resumed_ends_as_one_that_is_not(runs: Runs) -> None:
    runs.run("parts", rounds=2)
    runs.run("parts", resume=True)
    whole, parts = runs.state("whole"), runs.state("parts")
    assert set(whole) == set(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    for site in SITES:
        one, other = runs.network("whole", site), runs.network("parts", site)
        assert all(torch.equal(one[name], other[name]) for name in one)
