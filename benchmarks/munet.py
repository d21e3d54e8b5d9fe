"""M-Unet beside nnU-Net's plan network of the same data: parameters, operations and seconds per slice.

``python benchmarks/munet.py`` plans 2D networks for generated MR of four sequences, or for a data set under
``nnUNet_raw`` with ``--dataset ID``. Both take turns on the same slices, so that a busy machine slows both. Operations
are multiplications with addition (GMAC) of a forward pass, counted by torch.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedcmt.data.checks import find_dataset, read_dataset_json
from fedcmt.data.phantoms import make_cohort
from fedcmt.nnunet.network import build_network
from fedcmt.nnunet.planner import FederatedPlanner
from fedcmt.nnunet.planning_options import PlanningOptions
from fedcmt.nnunet.site_data import own_fingerprint

COHORT = {"Dataset901_Bench": {"kind": "brain_mr", "style": "site_a", "num_train": 8, "num_test": 1, "seed": 1}}
COMMON = {"mode": "consensus", "configuration": "2d", "min_cases": 3}
NETWORKS: dict[str, dict[str, Any]] = {
    "plan network": {"network": "plan"},
    "M-Unet": {"network": "MUNet", "base_features": 16},
}


def main() -> None:
    """Plan, count, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=int, help="nnU-Net id under nnUNet_raw; default: generated MR")
    parser.add_argument("--patch", type=int, nargs=2, help="slice in voxels; default: as planned")
    parser.add_argument("--turns", type=int, default=8, help="slices of each, after one to warm up")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        if options.dataset is None:
            make_cohort(Path(folder), COHORT)
        raw = Path(folder) if options.dataset is None else Path(os.environ["nnUNet_raw"])
        _compare(find_dataset(raw, options.dataset or 901), options)


def _compare(dataset: Path, options: argparse.Namespace) -> None:
    planned = {name: _network(dataset, {**COMMON, **given}) for name, given in NETWORKS.items()}
    patch = tuple(options.patch or min((patch for _, patch in planned.values()), key=max))
    channels = len(read_dataset_json(dataset)["channel_names"])
    image = torch.randn(1, channels, *patch, generator=torch.Generator().manual_seed(0))
    networks = {name: network.eval() for name, (network, _) in planned.items()}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for _ in range(options.turns + 1):
            for name, network in networks.items():
                seconds[name].append(_time(network, image))
    print(
        f"{dataset.name}: slices {channels}x{patch[0]}x{patch[1]}, {options.threads} threads, {options.turns} turns\n"
    )
    print("| network | parameters | GMAC per slice | seconds per slice |\n|---|--:|--:|--:|")
    for name, network in networks.items():
        parameters = sum(parameter.numel() for parameter in network.parameters())
        print(f"| {name} | {parameters:,} | {_gmac(network, image):.2f} | {statistics.median(seconds[name][1:]):.4f} |")
    plan, munet = (statistics.median(seconds[name][1:]) for name in NETWORKS)
    print(f"\nM-Unet takes {munet / plan:.2f} times as long as the plan network.")


def _network(dataset: Path, options: dict[str, Any]) -> tuple[nn.Module, tuple[int, ...]]:
    """The network as planned for this data, and its patch."""
    read = PlanningOptions.from_dict(options)
    fingerprint = own_fingerprint(dataset, read).to_dict()
    plans = FederatedPlanner(options, seed=0).plan({"bench": fingerprint}, {})["bench"]
    torch.manual_seed(0)
    dataset_json = read_dataset_json(dataset)
    network = build_network(plans, read.configuration, len(dataset_json["channel_names"]), dataset_json)
    network.decoder.deep_supervision = False  # type: ignore[union-attr]
    return network, tuple(plans["configurations"][read.configuration]["patch_size"])


def _time(network: nn.Module, image: Tensor) -> float:
    started = time.perf_counter()
    network(image)
    return time.perf_counter() - started


def _gmac(network: nn.Module, image: Tensor) -> float:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(image)
    return counter.get_total_flops() / 2e9


if __name__ == "__main__":
    main()
