"""Does a federation's model tell which cases trained it, and what does instance_dp change?

    nnUNet_raw=/data/nnUNet_raw python benchmarks/membership.py --noise 0.5 1 2

trains FedAvg on two hippocampus sites with few cases each, long enough to over-fit, without privacy and with
``instance_dp`` at each noise multiplier, and prints test Dice, epsilon, and how well a loss threshold tells training
cases from test cases: Yeom et al., Privacy Risk in Machine Learning, CSF 2018, https://arxiv.org/abs/1709.01604. The
attacker calls a case of a site a member if its loss is at most the mean loss of that site's members; advantage = true
positives - false positives, 0 for a coin and 1 for certainty. Numbers are means over sites, each attacked by itself:
sites' losses differ and so do their shares of test cases, which alone would tell members apart if they were pooled.
Intervals are 95 % bootstraps over each site's members and others.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from fedcmt.config import JobConfig
from fedcmt.data.checks import list_cases, read_dataset_json
from fedcmt.data.split import make_cuts
from fedcmt.inprocess import run_in_process
from fedcmt.job_folder import add_site, apply_overrides, remove_site, stage
from fedcmt.json_file import write_json
from fedcmt.nnunet.predict import load_predictor
from fedcmt.workspace import THREADS_VARIABLE, environment

ROOT = Path(__file__).resolve().parents[1]
SITES = {"uint8": 741, "float32": 742}
SETTINGS: dict[str, Any] = {
    "server.planning.mode": "consensus",
    "server.planning.extra_stem_convolution": False,
    "server.planning.base_features": 16,
    "server.planning.max_features": 64,
    "server.planning.max_patch_size": [24, 40, 40],
    "server.planning.max_stages": 3,
    "server.planning.batch_size": 2,
    "sites.fold": "all",
    "sites.optimizer.lr": 0.006,
    "sites.optimizer.schedule": "poly",
    "sites.grad_clip": 12,
    "sites.mirroring": False,
    "sites.mirror_axes": [],
    "sites.val_batches": 1,
    "sites.val_every": 1000,
}


def main() -> None:
    """Train, attack, print."""
    args = _parse()
    workspace = args.workspace.absolute()
    make_cuts(Path(os.environ["nnUNet_raw"]), workspace / "nnUNet_raw", _cohort(args.cases))
    variables = {"nnUNet_raw": str(workspace / "nnUNet_raw"), THREADS_VARIABLE: str(args.threads)}
    variables["nnUNet_preprocessed"] = str(workspace / "nnUNet_preprocessed")
    titles = ("noise", "epsilon", "test Dice", "member loss", "non-member loss", "attack's advantage", "attack's AUC")
    print(f"| {' | '.join(titles)} |\n{'|--:' * len(titles)}|")
    for noise in [None, *args.noise]:
        folder = workspace / ("none" if noise is None else f"z{noise:g}")
        with environment({**variables, "nnUNet_results": str(folder / "nnUNet_results")}):
            print(_row(noise, folder, args), flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="noise multipliers")
    parser.add_argument("--cases", type=int, default=8, help="training cases per site")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument("--expected-batch", type=int, default=2)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-2, help="below 1 / (training cases of a site)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workspace", type=Path, default=Path("workspace/benchmark_membership"))
    return parser.parse_args()


def _cohort(cases: int) -> dict[str, Any]:
    domains = {name: [f"Dataset{number}_{name.capitalize()}"] for name, number in SITES.items()}
    cut = {"kind": "domains", "source_id": 504, "by": "dtype", "domains": domains, "max_training_cases": cases}
    return {"cuts": [{**cut, "test_fraction": 0.15, "seed": 0}]}


def _row(noise: float | None, folder: Path, args: argparse.Namespace) -> str:
    results = _train(noise, folder, args)
    losses = [_losses(report, folder.parent / "nnUNet_raw") for report in results["sites"].values()]
    member, other = (np.mean([kind.mean() for kind in kinds]) for kinds in zip(*losses, strict=True))
    dice = np.mean([report["test"]["mean_dice"] for report in results["sites"].values()])
    epsilon = "∞" if noise is None else f"{results['privacy']['epsilon']:.2f}"
    shown = [interval(measure, losses) for measure in (advantage, auc)]
    means = f"{member:.3f} | {other:.3f}"
    return f"| {noise if noise is not None else '–'} | {epsilon} | {dice:.4f} | {means} | {shown[0]} | {shown[1]} |"


def _train(noise: float | None, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    job = stage_job(folder / "job_source")
    rounds = {"server.num_rounds": args.rounds, "sites.local_steps": args.local_steps, "server.seed": args.seed}
    private = {
        "mode": "instance_dp",
        "clip": args.clip,
        "noise_multiplier": noise,
        "expected_batch": args.expected_batch,
    }
    private |= {"delta": args.delta, "noise": "seeded"}
    apply_overrides(job, {**SETTINGS, **rounds, "server.privacy": {} if noise is None else private}.items())
    return run_in_process(JobConfig.from_folder(job), folder)


def stage_job(target: Path) -> Path:
    """The job ``brats_fedavg_instance_dp`` with the benchmark's sites."""
    stage(ROOT / "jobs" / "brats_fedavg_instance_dp", target)
    for name, dataset_id in SITES.items():
        config = target.with_name(f"{name}.json")
        write_json(config, {"dataset_id": dataset_id, "modality": "MR", "optimizer": {"name": "AdamW"}})
        add_site(target, name, config)
    for name in ("client1", "client2"):
        remove_site(target, name)
    return target


def _losses(report: dict[str, Any], raw: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean cross-entropy of each training and of each test case of a site, under its final model."""
    model = Path(os.environ["nnUNet_results"]) / report["model_folder"]
    predictor = load_predictor(model, "checkpoint_final.pth", device=torch.device("cpu"), mirroring=False)
    dataset = raw / report["dataset"]
    return _folder_losses(predictor, dataset, "Tr"), _folder_losses(predictor, dataset, "Ts")


def _folder_losses(predictor: nnUNetPredictor, dataset: Path, split: str) -> np.ndarray:
    settings = predictor.configuration_manager
    preprocessor = settings.preprocessor_class(verbose=False)
    losses = []
    for case, files in list_cases(dataset, read_dataset_json(dataset), images=f"images{split}").items():
        label = dataset / f"labels{split}" / f"{case}{predictor.dataset_json['file_ending']}"
        data, target, _ = preprocessor.run_case(
            [str(file) for file in files], str(label), predictor.plans_manager, settings, predictor.dataset_json
        )
        logits = predictor.predict_logits_from_preprocessed_data(torch.as_tensor(data)).float()
        target = torch.as_tensor(np.maximum(target, 0)).long()  # nnU-Net marks what it cropped as -1
        losses.append(float(torch.nn.functional.cross_entropy(logits[None], target)))
    return np.array(losses)


def advantage(members: np.ndarray, others: np.ndarray) -> float:
    """Of one site: members that the threshold calls members, less others that it calls so, as shares."""
    threshold = members.mean()
    return float((members <= threshold).mean() - (others <= threshold).mean())


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """Of one site: probability that a member's loss is below another's."""
    below = members[:, None] < others[None]
    equal = members[:, None] == others[None]
    return float((below + 0.5 * equal).mean())


def interval(
    measure: Callable[[np.ndarray, np.ndarray], float],
    losses: Sequence[tuple[np.ndarray, np.ndarray]],
    draws: int = 5000,
) -> str:
    """The mean over sites of a measure of (members, others), with its bootstrap interval."""
    random = np.random.default_rng(0)

    def again(values: np.ndarray) -> np.ndarray:
        return values[random.integers(len(values), size=len(values))]

    values = [np.mean([measure(again(members), again(others)) for members, others in losses]) for _ in range(draws)]
    low, high = np.percentile(values, [2.5, 97.5])
    return f"{np.mean([measure(*site) for site in losses]):.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
