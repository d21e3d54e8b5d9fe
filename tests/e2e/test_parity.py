"""Whole jobs that must end alike: two algorithms that are one where their settings make them so, and a resumed job.

Sites have unequal numbers of cases, so that a wrong weight shows. Every job runs in this process on networks of at
most three stages.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcmt.config import JobConfig, OptimizerConfig, ServerConfig, SiteConfig
from fedcmt.data.phantoms import make_brain_mr
from fedcmt.inprocess import run_in_process
from fedcmt.params import Params, load_tensors
from fedcmt.randomness import derive_seed
from fedcmt.workspace import THREADS_VARIABLE, environment
from tests import tiny

ROUNDS, STEPS = 2, 2
PLANNING = tiny.PLANNING
SITE = SiteConfig(
    801,
    "MR",
    fold="all",
    local_steps=STEPS,
    # AdamW's first steps blow up the rounding noise in biases before an instance norm to the size of its learning rate.
    optimizer=OptimizerConfig("SGD", lr=0.01, weight_decay=1e-5, momentum=0.9),
    val_batches=1,
    mirroring=False,
    device="cpu",
)
NORTH = {"north": SITE}
TWO = {"north": SITE, "south": replace(SITE, dataset_id=802)}
UNLIKE = {"north": SITE, "thin": replace(SITE, dataset_id=803)}
TRIPLETS = dict.fromkeys(("first", "second", "third"), SITE)
ASYMMETRIC = "asymmetric.AsymmetricFedAvg"
FEDCMT = "fedcmt.FedCMT"
PLAIN = {"optimizer": {"name": "sgd", "lr": 1.0}, "distillation": {"maximum": 0}}
"""FedCMT without a server optimiser and without distillation."""


class Jobs:
    """Runs jobs on one cohort, whose preprocessed cases they have in common."""

    def __init__(self, root: Path) -> None:
        self._root = root
        for name, num_train, channels, shape in (
            ("Dataset801_North", 5, ("FLAIR", "T1"), (24, 28, 20)),
            ("Dataset802_South", 7, ("FLAIR", "T1"), (28, 24, 20)),
            ("Dataset803_Thin", 6, ("T1",), (24, 32, 9)),
        ):
            folder = root / "raw" / name
            seed = int(name[7:10])
            make_brain_mr(
                folder, num_train=num_train, num_test=1, seed=seed, style="site_a", channels=channels, shape_vox=shape
            )

    def run(
        self,
        name: str,
        algorithm: str,
        sites: Mapping[str, SiteConfig] = TWO,
        *,
        rounds: int = ROUNDS,
        mode: str = "architecture",
        adapter: bool = False,
        resume: bool = False,
        **args: Any,
    ) -> "Ended":
        """Run a job to its end in ``name``, or on from where an earlier one ended there.

        With ``adapter`` the network has the block that FedCMT shares by modality.
        """
        folder = self._root / name
        planning = {**PLANNING, "mode": mode, "extra_stem_convolution": adapter}
        server = ServerConfig(rounds, planning=planning, seed=5, schedule_rounds=ROUNDS)
        spec = {"path": f"fedcmt.algorithms.{algorithm}", "args": args}
        variables = {
            "nnUNet_raw": str(self._root / "raw"),
            "nnUNet_preprocessed": str(self._root / "preprocessed"),
            "nnUNet_results": str(folder / "results"),
            THREADS_VARIABLE: "1",
        }
        with environment(variables):
            results = run_in_process(JobConfig(folder, "parity", server, spec, dict(sites)), folder, resume=resume)
        return Ended(folder, {site: row["model_folder"] for site, row in results["sites"].items()})


class Ended:
    """What a finished job left."""

    def __init__(self, folder: Path, model_folders: Mapping[str, str]) -> None:
        self.exported = {
            site: _checkpoint(folder / "results" / model / "fold_all" / "checkpoint_final.pth")
            for site, model in model_folders.items()
        }
        self.trained = {site: _trained(folder / "sites" / site / "last.safetensors") for site in model_folders}
        self.server, _ = load_tensors(folder / "server" / "state.safetensors")


def _checkpoint(path: Path) -> Params:
    return torch.load(path, weights_only=True)["network_weights"]


def _trained(path: Path) -> Params:
    """A site's model after its last local training."""
    tensors, _ = load_tensors(path)
    return {name: tensor for name, tensor in tensors.items() if name.startswith("network/")}


def distance(ours: Params, theirs: Params) -> float:
    """The largest difference of any element."""
    assert ours.keys() == theirs.keys() != set()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def assert_alike(ours: Mapping[str, Params], theirs: Mapping[str, Params]) -> None:
    assert ours.keys() == theirs.keys()
    for site in theirs:
        assert distance(ours[site], theirs[site]) <= 1e-6, site


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def fedavg(jobs: Jobs) -> Ended:
    return jobs.run("fedavg", "fedavg.FedAvg")


@pytest.fixture(scope="module")
def standalone(jobs: Jobs) -> Ended:
    return jobs.run("standalone", "standalone.Standalone")


def test_the_jobs_compared_could_differ(fedavg: Ended, standalone: Ended) -> None:
    assert distance(fedavg.exported["north"], fedavg.exported["south"]) == 0
    for site in TWO:
        assert distance(fedavg.exported[site], standalone.exported[site]) > 1e-4
        assert distance(fedavg.trained[site], standalone.trained[site]) > 1e-4
    assert distance(standalone.exported["north"], standalone.exported["south"]) > 1e-4


@pytest.mark.parametrize(
    ("algorithm", "args"),
    [
        ("fedper.FedPer", {"personal": "none"}),
        ("fedprox.FedProx", {"mu": 0}),
        ("fedopt.FedOpt", {"optimizer": {"name": "sgd", "lr": 1.0, "momentum": 0.0, "schedule": {"name": "constant"}}}),
    ],
    ids=["fedper-none", "fedprox-mu-0", "fedopt-sgd-lr-1"],
)
def test_is_fedavg(jobs: Jobs, fedavg: Ended, algorithm: str, args: dict[str, Any]) -> None:
    ended = jobs.run(algorithm, algorithm, **args)
    assert_alike(ended.exported, fedavg.exported)
    assert distance(ended.server, fedavg.server) <= 1e-6


def test_averaging_by_shape_over_equal_networks_is_fedavg(jobs: Jobs, fedavg: Ended) -> None:
    ended = jobs.run("by_shape", ASYMMETRIC)
    assert_alike(ended.exported, fedavg.exported)
    assert distance({name.partition("@")[0]: t for name, t in ended.server.items()}, fedavg.server) <= 1e-6


def test_fedper_with_everything_personal_is_standalone(jobs: Jobs, standalone: Ended) -> None:
    """FedPer's product is the received model and Standalone's the trained one, but nothing comes to be received."""
    ended = jobs.run("fedper_all", "fedper.FedPer", personal="all")
    assert_alike(ended.exported, standalone.exported)
    assert_alike(ended.trained, standalone.trained)
    assert ended.server == standalone.server == {}


def test_fedavg_of_one_site_is_centralised_training_on_it(jobs: Jobs) -> None:
    """Centralised: all steps in one go, and no server that changes anything."""
    ended = jobs.run("one_site", "fedavg.FedAvg", NORTH)
    at_once = {"north": replace(SITE, local_steps=ROUNDS * STEPS)}
    centralised = jobs.run("centralised", "standalone.Standalone", at_once, rounds=1)
    assert_alike(ended.exported, centralised.exported)
    assert_alike(ended.trained, centralised.trained)
    received = {name.removeprefix("params/"): tensor for name, tensor in ended.server.items()}
    assert distance(received, {n.removeprefix("network/"): t for n, t in centralised.trained["north"].items()}) <= 1e-6


@pytest.fixture
def one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites draw the same numbers, whatever their names: equal data make them equal sites."""
    monkeypatch.setattr("fedcmt.session.derive_seed", lambda seed, *names: derive_seed(seed, names[0]))


@pytest.mark.usefixtures("one_stream")
def test_fedcmt_of_equal_sites_is_training_alone(jobs: Jobs) -> None:
    """At any radius, since mode 2 hands on an update that all sites send; mode 0 would lengthen it by 1 + c."""
    alone = jobs.run("alone", "standalone.Standalone", NORTH, adapter=True)
    for radius in (0.0, 0.4, 0.9):
        equal = jobs.run(f"equal_{radius}", FEDCMT, TRIPLETS, adapter=True, radius=radius, **PLAIN)
        for site in TRIPLETS:
            assert distance(equal.trained[site], alone.trained["north"]) <= 1e-6, (radius, site)
            assert distance(equal.exported[site], alone.exported["north"]) <= 1e-6, (radius, site)
    lengthened = jobs.run("lengthened", FEDCMT, TRIPLETS, adapter=True, radius=0.4, rescale=0, **PLAIN)
    assert distance(lengthened.trained["first"], alone.trained["north"]) > 1e-4


def test_fedcmt_with_its_parts_switched_off_is_fedavg_on_the_encoder(jobs: Jobs) -> None:
    """Between sites of one modality and the same sequences; FedPer with personal decoders is that average."""
    off = {"radius": 0, "agreement_exponent": 0, "largest_share": 1, "smallest_share": 0, **PLAIN}
    ended = jobs.run("switched_off", FEDCMT, adapter=True, **off)
    encoder = jobs.run("encoder", "fedper.FedPer", adapter=True, personal="decoder")
    assert_alike(ended.trained, encoder.trained)
    conflict_averse = jobs.run("switched_on", FEDCMT, adapter=True, **{**off, "radius": 0.4})
    assert distance(conflict_averse.trained["north"], encoder.trained["north"]) > 1e-5


def test_sites_with_plans_of_their_own_share_what_agrees_and_are_resumed(jobs: Jobs) -> None:
    straight = jobs.run("own", ASYMMETRIC, UNLIKE, mode="own")
    jobs.run("own_resumed", ASYMMETRIC, UNLIKE, mode="own", rounds=1)
    resumed = jobs.run("own_resumed", ASYMMETRIC, UNLIKE, mode="own", resume=True)
    assert_alike(resumed.exported, straight.exported)
    assert distance(resumed.server, straight.server) <= 1e-6
    north, thin = straight.exported["north"], straight.exported["thin"]
    common = {name for name in north.keys() & thin.keys() if north[name].shape == thin[name].shape}
    assert common < north.keys()
    assert all(torch.equal(north[name], thin[name]) for name in common)
    assert any(name.endswith("conv.weight") for name in common)
