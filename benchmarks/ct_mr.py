"""FedCMT beside standalone, FedAvg and FedOpt on real CT and MR: same splits, seeds, steps and network.

    nnUNet_raw=/data/nnUNet_raw python benchmarks/ct_mr.py --seeds 0 1 2

runs the job ``ct_mr_fedcmt`` (two CT and two MR sites that segment, one CT site that classifies) once per method and
seed and prints, per site, mean and standard deviation over seeds, and each method's paired difference from standalone
and from FedAvg with a 95 % interval: Dice over the sites that segment, accuracy at the one that classifies. A run whose
results are there already is not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np

from fedcmt.evaluation.classification import read_probabilities

ROOT = Path(__file__).resolve().parents[1]

PLAIN_SERVER = 'algorithm.optimizer={"name": "sgd", "lr": 1.0}'
NO_DISTILLATION = "algorithm.distillation.maximum=0"
MEAN = [
    "algorithm.radius=0",
    "algorithm.agreement_exponent=0",
    "algorithm.largest_share=1",
    "algorithm.smallest_share=0",
    NO_DISTILLATION,
]
"""The encoder's mean, weighted by cases."""
FEDCMT = ["algorithm.case_exponent=0", PLAIN_SERVER, NO_DISTILLATION]
METHODS: dict[str, tuple[str, list[str]]] = {
    "standalone": ("ct_mr_standalone", []),
    "fedavg": ("ct_mr_fedcmt", [*MEAN, PLAIN_SERVER]),
    "fedopt": ("ct_mr_fedcmt", MEAN),
    "fedcmt": ("ct_mr_fedcmt", FEDCMT),
    "fedcmt-published": ("ct_mr_fedcmt", []),
    "fedcmt+cases": ("ct_mr_fedcmt", [PLAIN_SERVER, NO_DISTILLATION]),
    "fedcmt+kd": ("ct_mr_fedcmt", ["algorithm.case_exponent=0", PLAIN_SERVER]),
    "fedcmt-ca": ("ct_mr_fedcmt", [*FEDCMT, "algorithm.radius=0"]),
    "fedcmt-adapters": ("ct_mr_fedcmt", [*FEDCMT, "algorithm.adapters=personal"]),
    "fedcmt-weights": ("ct_mr_fedcmt", [*FEDCMT, "algorithm.agreement_exponent=0"]),
}
"""Method to its job and settings: the first four are compared, the others say what their difference is made of.

``fedcmt`` weighs sites equally, without momentum at the server and without distillation; ``fedcmt-published`` is the
job as it is. Plus and minus name what is added or left out.
"""

SMALL = {
    "server.planning.base_features": 16,
    "server.planning.max_features": 128,
    "server.planning.max_patch_size": [24, 40, 40],
    "server.planning.max_stages": 4,
    "server.planning.batch_size": 2,
    "sites.fold": "all",
    "sites.optimizer.lr": 0.01,
    "sites.optimizer.schedule": "poly",
    "sites.val_batches": 4,
    "sites.val_every": 20,
    "sites.mirroring": False,
    "sites.mirror_axes": [],
    "sites.grad_clip": 12,
}
"""A network and patches for two cores. Without mirroring, since labels here tell left from right."""

CLASSIFIES = "ct_classes"

Scores = dict[str, dict[str, list[float]]]
"""Site to test case to one score per seed: mean Dice over labels, or 1 for the right class and 0 for a wrong one."""


def main() -> None:
    """Run what is missing and print the tables."""
    args = _parse()
    runs = [(method, seed) for seed in args.seeds for method in args.methods]
    with ThreadPoolExecutor(args.parallel) as pool:
        list(pool.map(lambda run: _run(*run, args), runs))
    scores = {method: _scores([_folder(args, method, seed) for seed in args.seeds]) for method in args.methods}
    print(_table(scores))
    for reference in ("standalone", "fedavg"):
        if reference in scores:
            print(f"\nPaired differences from {reference}, 95 % interval: Dice, mean over sites; accuracy\n")
            for method in args.methods:
                if method != reference:
                    parts = [
                        _difference(*(_only(scores[m], classifies) for m in (method, reference)))
                        for classifies in (False, True)
                    ]
                    print(f"{method:<16} {'   '.join(parts)}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["standalone", "fedavg", "fedopt", "fedcmt"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--local-steps", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], help="as start_fl.sh's; federated methods only get it "
                        "if it is of the algorithm")  # fmt: skip
    parser.add_argument("--workspace", type=Path, default=Path("workspace/benchmark_ct_mr"))
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per run")
    return parser.parse_args()


def _folder(args: argparse.Namespace, method: str, seed: int) -> Path:
    return (args.workspace / f"{method}_{seed}").absolute()


def _run(method: str, seed: int, args: argparse.Namespace) -> None:
    job, settings = METHODS[method]
    folder = _folder(args, method, seed)
    options = ["--rounds", str(args.rounds), "--local-steps", str(args.local_steps), "--seed", str(seed)]
    options += ["--threads", str(args.threads)]
    given = [text for text in args.set if method != "standalone" or not text.startswith("algorithm.")]
    for text in [*(f"{key}={json.dumps(value)}" for key, value in SMALL.items()), *settings, *given]:
        options += ["--set", text]
    kept = folder / "options.json"
    if (folder / "results.json").exists():
        if not kept.exists() or json.loads(kept.read_text()) != options:
            raise SystemExit(f"{folder} holds the results of other settings; give --workspace another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(options))
    command = [sys.executable, "-m", "fedcmt.run", job, "--engine", "inprocess", "--workspace", str(folder), *options]
    shared = {"nnUNet_preprocessed": str((args.workspace / "preprocessed").absolute())}
    environment = {**os.environ, **shared, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": str(args.threads)}
    with (folder / "terminal.log").open("w") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"{method}, seed {seed} failed: {folder / 'terminal.log'}")
    print(f"{method}, seed {seed}: done", file=sys.stderr, flush=True)


def _scores(folders: Sequence[Path]) -> Scores:
    scores: Scores = {}
    for folder in folders:
        for site, report in json.loads((folder / "results.json").read_text())["sites"].items():
            predictions = Path(report["model_folder"]) / "predictions" / "imagesTs"
            dataset = folder / "nnUNet_raw" / report["dataset"]
            cases = _right(predictions, dataset) if report["task"] == "classification" else _dice(predictions)
            for case, value in cases.items():
                scores.setdefault(site, {}).setdefault(case, []).append(value)
    return scores


def _right(predictions: Path, dataset: Path) -> dict[str, float]:
    truth = json.loads((dataset / "classes.json").read_text())
    names, probabilities = read_probabilities(predictions / "probabilities.csv")
    assert list(names) == truth["classes"], dataset
    return {case: float(np.argmax(p) == truth["cases"][case]) for case, p in probabilities.items()}


def _dice(predictions: Path) -> dict[str, float]:
    cases: dict[str, list[float]] = {}
    for row in json.loads((predictions / "metrics.json").read_text())["per_case"]:
        cases.setdefault(row["case"], []).append(row["dice"])
    return {case: float(np.mean(values)) for case, values in cases.items()}


def _only(scores: Scores, classifies: bool) -> Scores:
    return {site: cases for site, cases in scores.items() if (site == CLASSIFIES) == classifies}


def _table(scores: Mapping[str, Scores]) -> str:
    sites = sorted(_only(next(iter(scores.values())), classifies=False))
    rows = [["method", *sites, "mean Dice", f"{CLASSIFIES}, accuracy"]]
    for method, by_site in scores.items():
        per_seed = np.array([np.mean(list(by_site[site].values()), axis=0) for site in [*sites, CLASSIFIES]])
        per_seed = np.insert(per_seed, len(sites), per_seed[:-1].mean(axis=0), axis=0)
        cells = [f"{v.mean():.4f} ± {v.std(ddof=1) if len(v) > 1 else 0:.4f}" for v in per_seed]
        rows.append([method, *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|--:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def _difference(scores: Scores, reference: Scores, draws: int = 10_000) -> str:
    """Mean over sites of the mean paired difference, and its percentile bootstrap over seeds and each site's cases."""
    random = np.random.default_rng(0)
    sites = [np.array([np.subtract(scores[s][c], reference[s][c]) for c in scores[s]]) for s in scores]
    num_seeds = sites[0].shape[1]
    means = []
    for _ in range(draws):
        seeds = random.integers(num_seeds, size=num_seeds)
        drawn = [site[random.integers(len(site), size=len(site))][:, seeds].mean() for site in sites]
        means.append(np.mean(drawn))
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{np.mean([site.mean() for site in sites]):+.4f} [{low:+.4f}, {high:+.4f}]"


if __name__ == "__main__":
    main()
