"""Training steps per second of a site in a federation beside stock nnUNetTrainer: same plans, data, threads, one
process.

``python benchmarks/throughput.py`` prints both and their ratio, and what distillation adds to a step. All take turns,
so that a busy machine slows all.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from fedcmt.algorithms.base import Algorithm
from fedcmt.algorithms.fedavg import FedAvg
from fedcmt.algorithms.fedcmt import FedCMT
from fedcmt.config import OptimizerConfig, SiteConfig
from fedcmt.data.phantoms import make_cohort
from fedcmt.messages import Message, Task
from fedcmt.nnunet.paths import nnunet_paths
from fedcmt.nnunet.planner import FederatedPlanner
from fedcmt.site import Site
from fedcmt.workspace import THREADS_VARIABLE

DATASET = {"Dataset901_Bench": {"kind": "brain_mr", "style": "site_a", "num_train": 8, "num_test": 1, "seed": 1}}
PLANNING = {"mode": "architecture", "base_features": 16, "max_stages": 4, "batch_size": 2}
ALGORITHMS: dict[str, Algorithm] = {
    "FedAvg": FedAvg(),
    "FedCMT, not distilling": FedCMT(distillation={"maximum": 0}),
    "FedCMT": FedCMT(),
}
SGD = OptimizerConfig("SGD", lr=1e-2, weight_decay=3e-5, momentum=0.99, schedule="poly")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="steps per turn")
    parser.add_argument("--turns", type=int, default=8, help="turns of each, after one to warm up")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    os.environ[THREADS_VARIABLE] = str(options.threads)
    os.environ["nnUNet_n_proc_DA"] = "0"
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_cohort(root / "raw", DATASET)
        with nnunet_paths(root / "raw", root / "preprocessed", root / "results"):
            _compare(root, options)


def _compare(root: Path, options: argparse.Namespace) -> None:
    turns = options.turns + 1
    sites = {name: _site(root, name, algorithm, options.steps, turns + 1) for name, algorithm in ALGORITHMS.items()}
    plans = _read(next((root / "preprocessed" / "Dataset901_Bench").glob("nnUNetPlans_bench_*.json")))
    stock = _stock(plans, root)
    rates: dict[str, list[float]] = {"stock nnUNetTrainer": [], **{name: [] for name in sites}}
    for turn in range(turns):
        rates["stock nnUNetTrainer"].append(_time_stock(stock, options.steps))
        for name, (site, payload) in sites.items():
            answer = site.handle(Task.TRAIN, Message({"round": turn + 1, "frozen": []}, payload))  # 0 never distils
            rates[name].append(options.steps / answer.meta["train_seconds"])
    patch = plans["configurations"]["3d_fullres"]["patch_size"]
    print(f"patch {patch}, {options.threads} threads, median of {options.turns} turns of {options.steps} steps")
    for name, values in rates.items():
        print(f"{name:<28} {statistics.median(values[1:]):.3f} steps/s")
    _print_ratio("FedAvg / stock", rates["FedAvg"], rates["stock nnUNetTrainer"])
    _print_ratio("a step with distillation costs", rates["FedCMT, not distilling"], rates["FedCMT"])


def _print_ratio(title: str, above: list[float], below: list[float]) -> None:
    ratios = [one / other for one, other in zip(above[1:], below[1:], strict=True)]
    print(f"{title}: {statistics.median(ratios):.3f} (turns {min(ratios):.3f}-{max(ratios):.3f})")


def _site(root: Path, name: str, algorithm: Algorithm, steps: int, rounds: int) -> tuple[Site, dict[str, torch.Tensor]]:
    config = SiteConfig(901, "MR", local_steps=steps, optimizer=SGD, grad_clip=12.0, val_batches=1, val_every=10**6)
    site = Site("bench", config, algorithm, root / "sites" / name)
    planner = FederatedPlanner(PLANNING, seed=0)
    introduction = Message({"job": "bench", "seed": 0, "planning": PLANNING, "privacy": {}, "num_sites": 1})
    answer = site.handle(Task.FINGERPRINT, introduction)
    fingerprints, modalities = {"bench": answer.meta["fingerprint"]}, {"bench": answer.meta["modality"]}
    plans = planner.plan(fingerprints, {})
    site.handle(
        Task.PREPARE,
        Message({"plans": plans["bench"], "num_rounds": rounds, "schedule_rounds": rounds, "resume": False}),
    )
    return site, planner.initial(plans, fingerprints, modalities, algorithm.scopes)


def _stock(plans: dict, root: Path) -> nnUNetTrainer:
    dataset_json = _read(root / "raw" / "Dataset901_Bench" / "dataset.json")
    with contextlib.redirect_stdout(io.StringIO()):
        arguments = {**copy.deepcopy(plans), "continue_training": False}
        trainer = nnUNetTrainer(arguments, "3d_fullres", 0, dataset_json, torch.device("cpu"))
        trainer.on_train_start()
        trainer.on_train_epoch_start()
    return trainer


def _time_stock(trainer: nnUNetTrainer, steps: int) -> float:
    trainer.network.train()
    started = time.perf_counter()
    for _ in range(steps):
        trainer.train_step(next(trainer.dataloader_train))
    return steps / (time.perf_counter() - started)


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
