"""Check, fingerprint and preprocess one data set ahead of a job: ``python src/script_preprocess.py -d DATASET_ID``.

A job does the same by itself; doing it before means that mistakes in the data show now, and that jobs with the same
preprocessing (planning mode ``architecture``: spacing and normalisation are the site's own) start at once.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fedcmt.data.checks import DatasetError, check_dataset, find_dataset
from fedcmt.nnunet.fingerprint import bin_policy
from fedcmt.nnunet.planning_options import CONFIGURATIONS, PLANNERS, PlanningOptions
from fedcmt.nnunet.plans import plan_federation
from fedcmt.nnunet.site_data import own_fingerprint, prepare_data
from fedcmt.progress import Progress
from fedcmt.workspace import nnunet_folder

logger = logging.getLogger("fedcmt")


def main() -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        for dataset_id in options.d:
            _preprocess(dataset_id, options)
    except (DatasetError, ValueError, OSError, RuntimeError) as error:
        print(f"script_preprocess.py: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", type=int, nargs="+", required=True, metavar="DATASET_ID", help="nnU-Net dataset ids")
    parser.add_argument("-c", choices=CONFIGURATIONS, default="3d_fullres", help="nnU-Net configuration")
    parser.add_argument("-pl", choices=sorted(PLANNERS), default="ExperimentPlanner", help="nnU-Net planner")
    parser.add_argument("-np", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes")
    parser.add_argument(
        "--fold-all", action="store_true", help="the job trains on all cases, so fewer than 5 are enough"
    )
    parser.add_argument("--min-cases", type=int, default=5, help="planning.min_cases of the job")
    return parser


def _preprocess(dataset_id: int, arguments: argparse.Namespace) -> None:
    dataset = find_dataset(nnunet_folder("nnUNet_raw"), dataset_id)
    preprocessed = nnunet_folder("nnUNet_preprocessed")
    check_dataset(dataset, num_folds=None if arguments.fold_all else 5)
    options = PlanningOptions(
        mode="architecture", planner=arguments.pl, configuration=arguments.c, min_cases=arguments.min_cases
    )
    logger.info("%s: extracting the fingerprint", dataset.name)
    fingerprint = own_fingerprint(dataset, options)
    plans = plan_federation({"local": fingerprint.coarsened(bin_policy(options.mode))}, options)["local"]
    progress = Progress(f"{dataset.name}: preprocessing", logger)
    own = prepare_data(
        plans,
        fingerprint,
        dataset,
        preprocessed,
        options,
        site="local",
        job="preprocess",
        num_processes=arguments.np,
        progress=progress.update,
    )
    chosen = own["configurations"][options.configuration]
    print(
        f"{dataset.name}: {fingerprint.num_cases} cases in {preprocessed / dataset.name / chosen['data_identifier']}, "
        f"spacing {chosen['spacing']} mm, {chosen['normalization_schemes']}"
    )


if __name__ == "__main__":
    sys.exit(main())
