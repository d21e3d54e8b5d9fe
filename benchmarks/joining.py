"""A site that joins a finished federation, beside the same site alone with as many local steps, on real images.

    nnUNet_raw=/data/nnUNet_raw python benchmarks/joining.py --seeds 0 1 2

Three hippocampus sites (MR) and one that classifies organs (CT) train FedCMT; then a hippocampus site of the scarcer
intensity domain joins, warms up, is ramped in and trains on. The same site trains alone from scratch for comparison.
Prints its test Dice of both, per seed.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
from ct_mr import SMALL

from fedcmt.config import JobConfig
from fedcmt.data.split import make_cuts
from fedcmt.inprocess import run_in_process
from fedcmt.job_folder import add_site, apply_overrides, remove_site, stage
from fedcmt.workspace import THREADS_VARIABLE, environment

ROOT = Path(__file__).resolve().parents[1]

COHORT = {
    "cuts": [
        {
            "kind": "deal",
            "source_id": 502,
            "sites": {"Dataset713_Organs": "organ_boxes"},
            "box_mm": [125, 125, 80],
            "max_training_cases": 12,
            "test_fraction": 0.25,
            "seed": 0,
        },
        {
            "kind": "domains",
            "source_id": 504,
            "by": "dtype",
            "domains": {
                "uint8": ["Dataset721_Uint8A", "Dataset722_Uint8B"],
                "float32": ["Dataset723_Float32A", "Dataset724_Float32B"],
            },
            "max_training_cases": 30,
            "test_fraction": 0.3,
            "seed": 0,
        },
    ]
}
FOUNDERS = {"uint8_b": 722, "float32_a": 723, "float32_b": 724}
NEWCOMER = {"uint8_a": 721}
SETTINGS = {
    **SMALL,
    "sites.optimizer.lr": 0.003,
    "sites.optimizer.schedule": "constant",
    "sites.val_batches": 2,
    "sites.val_every": 1000,
}


def main() -> None:
    """Run each seed and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--founding-rounds", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=10, help="of the newcomer: 2 warm, 5 ramped in, then in full")
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument("--workspace", type=Path, default=Path("workspace/benchmark_joining"))
    args = parser.parse_args()
    workspace = args.workspace.absolute()
    make_cuts(Path(os.environ["nnUNet_raw"]), workspace / "nnUNet_raw", COHORT)
    scores = []
    for seed in args.seeds:
        scores.append(_compare(workspace / str(seed), seed, args))
        print(f"seed {seed}: joined {scores[-1][0]:.4f}, alone {scores[-1][1]:.4f}", flush=True)
    difference = np.subtract(*np.transpose(scores))
    print(f"joined - alone: {difference.mean():+.4f} ± {difference.std(ddof=1) if len(scores) > 1 else 0:.4f}")


def _compare(folder: Path, seed: int, args: argparse.Namespace) -> tuple[float, float]:
    """Test Dice of the newcomer, joined and alone."""
    founding, total = args.founding_rounds, args.founding_rounds + args.rounds
    federation = folder / "federation"
    settings = {**SETTINGS, "sites.local_steps": args.local_steps, "server.seed": seed}
    job = _job("ct_mr_fedcmt", folder / "job", ["ct_a", "ct_b", "mr_a", "mr_b"], FOUNDERS)
    apply_overrides(job, {**settings, "ct_classes.dataset_id": 713, "server.num_rounds": founding}.items())
    _run(job, federation, resume=False)
    _add(job, NEWCOMER)
    apply_overrides(job, {**settings, "server.num_rounds": total}.items())
    joined = _run(job, federation, resume=True)
    job = _job("ct_mr_standalone", folder / "alone_job", ["ct_a", "ct_b", "mr_a", "mr_b"], NEWCOMER)
    remove_site(job, "ct_classes")
    apply_overrides(job, {**settings, "server.num_rounds": args.rounds}.items())
    return joined, _run(job, folder / "alone", resume=False)


def _job(name: str, target: Path, without: Iterable[str], sites: dict[str, int]) -> Path:
    stage(ROOT / "jobs" / name, target)
    for site in without:
        remove_site(target, site)
    _add(target, sites)
    return target


def _add(job: Path, sites: dict[str, int]) -> None:
    for name, dataset_id in sites.items():
        config = job.with_name(f"{name}.json")
        config.write_text(json.dumps({"dataset_id": dataset_id, "modality": "MR"}))
        add_site(job, name, config)


def _run(job: Path, workspace: Path, *, resume: bool) -> float:
    """Run a job in this process; returns the newcomer's mean Dice if it takes part, else NaN."""
    raw = workspace.parents[1] / "nnUNet_raw"
    variables = {
        "nnUNet_raw": str(raw),
        "nnUNet_preprocessed": str(raw.with_name("nnUNet_preprocessed")),
        "nnUNet_results": str(workspace / "nnUNet_results"),
        THREADS_VARIABLE: "1",
    }
    with environment(variables):
        results = run_in_process(JobConfig.from_folder(job), workspace, resume=resume)
    (name,) = NEWCOMER
    return results["sites"][name]["test"]["mean_dice"] if name in results["sites"] else float("nan")


if __name__ == "__main__":
    main()
