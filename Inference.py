"""Segment or classify images with the models of a finished job.

Test images of every site, each into <model folder>/predictions/imagesTs: label maps, or probabilities.csv from a
site that classifies; scored where there are references:

    python Inference.py --workspace workspace/brats_sdl
    python Inference.py --workspace workspace/brats_sdl --clients app_client1 --gpu_ids 0

Any folder of images with one site's model:

    python Inference.py --workspace workspace/brats_sdl --clients client1 --input my_images --output my_results

With FedMEPDNet or MUNet, from some of the sequences that the model was trained on, or from each subset in turn:

    python Inference.py --workspace workspace/brats_fedmepd --clients fusion --channels FLAIR,T2
    python Inference.py --workspace workspace/brats_fedmepd --clients fusion --every_subset
"""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from fedcmt.data.checks import DatasetError
from fedcmt.evaluation.metrics import EvaluationError
from fedcmt.evaluation.regions import REGIONS_EXPECTED, is_regions
from fedcmt.evaluation.subsets import AS_MARKDOWN, Subset, SubsetError, chosen_sequences, folder_name, sequences_of
from fedcmt.evaluation.tables import results_table
from fedcmt.json_file import JsonFileError, read_json

SEGMENTATION, CLASSIFICATION = "segmentation", "classification"


class UserError(Exception):
    """Something the caller can put right; shown as one line."""


@dataclass(frozen=True)
class Work:
    """What to do for one site.

    Attributes:
      client: Site name.
      model: nnU-Net model folder.
      images: Folder of images.
      output: Folder for label maps or probabilities, and for scores; for every subset, the folder of those folders.
      labels: Folder of reference label maps; for classification the data set folder with the cases' classes. None
        without references.
      task: What the model does.
      class_source: Where in ``labels`` the classes are, as `read_classes` takes it; None for segmentation.
      sequences: Those of the model's to go by; None for all channels.
      every_subset: Go by each subset of the model's sequences in turn; ``labels`` are there.
      score_regions: Region name -> label ids that are scored; empty for the model's own labels or regions.
    """

    client: str
    model: Path
    images: Path
    output: Path
    labels: Path | None
    task: str = SEGMENTATION
    class_source: str | None = None
    sequences: Subset | None = None
    every_subset: bool = False
    score_regions: Mapping[str, Sequence[int]] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse(arguments)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    try:
        works = plan(args)
        gpus = usable_gpus(args)
        if len(works) == 1:
            predict(works[0], args, gpu=gpus[0] if gpus else None)
            failed = []
        else:
            failed = run_side_by_side(works, args, gpus)
        if not args.one_of_several:
            show_scores(works, failed)
    except (UserError, DatasetError, EvaluationError, OSError) as error:
        logging.getLogger(__name__).debug("where it came from", exc_info=True)
        return complain(args, error)
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--workspace", type=Path, required=True, help="folder of the job's results, with results.json")
    parser.add_argument("--clients", nargs="+", metavar="CLIENT", help="client1 or app_client1; default: all")
    parser.add_argument("--gpu_ids", nargs="+", type=int, default=[0], metavar="ID", help="GPUs to share; default: 0")
    parser.add_argument("--sites_per_gpu", type=int, default=1, help="sites at once on one GPU; default: 1")
    parser.add_argument(
        "--input", type=Path, help="folder of images CASE_0000.nii.gz ...; default: imagesTs of the data set"
    )
    parser.add_argument("--output", type=Path, help="default: <model folder>/predictions/<name of the input folder>")
    some = parser.add_mutually_exclusive_group()
    some.add_argument(
        "--channels",
        type=lambda text: [name.strip() for name in text.split(",")],
        metavar="NAME,...",
        help="predict from these of the model's sequences alone; files of the others are not read and may be absent; "
        "FedMEPDNet and MUNet",
    )
    some.add_argument(
        "--every_subset",
        action="store_true",
        help="predict from every subset of the model's sequences, and write a table of their scores, subsets.csv and "
        "subsets.md, beside the subsets' folders; FedMEPDNet and MUNet",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        help="references to score against: a folder of label maps, or for a classification client a whole data set "
        "folder with classes.json or classes.csv; default: those of the data set",
    )
    parser.add_argument("--checkpoint", choices=["final", "best"], default="final")
    parser.add_argument(
        "--disable_tta", action="store_true", help="do not average over mirrored images: faster, less accurate"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log in detail")
    parser.add_argument("--one_of_several", action="store_true", help=argparse.SUPPRESS)  # set for child processes
    args = parser.parse_args(arguments)
    if args.sites_per_gpu < 1:
        parser.error(f"--sites_per_gpu is {args.sites_per_gpu}; expected 1 or more")
    return args


def plan(args: argparse.Namespace) -> list[Work]:
    """One `Work` per client, with every folder it reads checked.

    Raises:
      UserError: If the workspace, a client, a model or images are missing.
    """
    sites = read_sites(args.workspace)
    clients = [known_client(name, sites) for name in args.clients or sites]
    clients = list(dict.fromkeys(clients))
    if not clients:
        raise UserError(f"{args.workspace / 'results.json'}: names no site. Run the job again or restore the file.")
    if len(clients) > 1 and (args.input or args.output or args.labels):
        raise UserError(
            f"--input, --output and --labels are for one client; got {', '.join(clients)}. Name one with --clients."
        )
    return [plan_client(client, sites[client], args) for client in clients]


def read_sites(workspace: Path) -> dict[str, dict]:
    """``sites`` of the workspace's results.json.

    Raises:
      UserError: If there is no usable one.
    """
    path = workspace / "results.json"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file. Give the workspace of a job that has finished, e.g. workspace/brats_sdl."
        )
    try:
        return json.loads(path.read_text())["sites"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a job's results ({error!r}). Run the job again or restore the file.") from error


def known_client(name: str, sites: Mapping[str, Mapping]) -> str:
    """The site of this name, with or without FLARE's ``app_`` in front.

    Raises:
      UserError: If there is none, or its task is unknown.
    """
    found = next((n for n in (name, name.removeprefix("app_"), f"app_{name}") if n in sites), None)
    if found is None:
        raise UserError(f"unknown client {name!r}; this workspace has {', '.join(sites)}.")
    if task_of(sites[found]) not in (SEGMENTATION, CLASSIFICATION):
        raise UserError(
            f"client {found} has a {task_of(sites[found])!r} model; expected {SEGMENTATION} or {CLASSIFICATION}. "
            "Restore results.json."
        )
    return found


def task_of(site: Mapping) -> str:
    """What the site's model does."""
    return site.get("task", SEGMENTATION)


def plan_client(client: str, site: Mapping, args: argparse.Namespace) -> Work:
    """Where one client's model, images, labels and results are.

    Raises:
      UserError: If the model, the images or the labels asked for are missing.
    """
    if not site.get("model_folder"):
        raise UserError(
            f"client {client} has no model in {args.workspace / 'results.json'}: it did not finish the job."
        )
    model = args.workspace / site["model_folder"]  # an absolute one replaces the workspace
    if not model.is_dir():
        raise UserError(f"client {client}: model folder {model} is missing. Run the job again or restore the folder.")
    images = args.input or raw_dataset(args.workspace, site["dataset"]) / "imagesTs"
    if not images.is_dir():
        hint = "Check it." if args.input else "Put test images there, or give --input."
        raise UserError(f"client {client}: no folder of images {images}. {hint}")
    if args.labels is not None and not args.labels.is_dir():
        raise UserError(f"client {client}: no folder of labels {args.labels}. Check --labels.")
    dataset = images.parent if args.input is None else None
    sequences = plan_sequences(client, site, model, args)
    output = args.output or plan_output(model, images, sequences, args.every_subset)
    if task_of(site) == CLASSIFICATION:
        labels, source = plan_classes(client, site, dataset, args.labels)
        return Work(client, model, images, output, labels, CLASSIFICATION, source)
    return Work(
        client,
        model,
        images,
        output,
        plan_labels(client, dataset, args),
        sequences=sequences,
        every_subset=args.every_subset,
        score_regions=plan_score_regions(client, site, args.workspace),
    )


def plan_score_regions(client: str, site: Mapping, workspace: Path) -> Mapping[str, Sequence[int]]:
    """The regions by which the job scored the site; empty where it scored single labels or the data set's regions.

    Raises:
      UserError: If results.json holds anything else.
    """
    regions = site.get("score_regions", {})
    if not is_regions(regions):
        raise UserError(
            f"client {client}: score_regions in {workspace / 'results.json'} is {regions!r}, expected "
            f"{REGIONS_EXPECTED}. Restore the file."
        )
    return regions


def plan_labels(client: str, dataset: Path | None, args: argparse.Namespace) -> Path | None:
    """The folder of reference label maps; None if there is none.

    Args:
      client: Site name.
      dataset: The data set the images belong to; None for images from elsewhere.
      args: Options of the command line.

    Raises:
      UserError: If every subset is to be scored without any.
    """
    if args.labels is not None:
        return args.labels
    if dataset is not None and (dataset / "labelsTs").is_dir():
        return dataset / "labelsTs"
    if args.every_subset:
        raise UserError(f"client {client}: --every_subset needs label maps to score against. Give --labels.")
    return None


def plan_sequences(client: str, site: Mapping, model: Path, args: argparse.Namespace) -> Subset | None:
    """The sequences that --channels means; None without it.

    Raises:
      UserError: If the model does not have them, or no sequences at all.
    """
    if args.channels is None and not args.every_subset:
        return None
    if task_of(site) == CLASSIFICATION:
        raise UserError(
            f"client {client}: a classification model needs every channel. Leave out --channels and --every_subset."
        )
    try:
        dataset_json = read_json(model / "dataset.json")
        if args.channels is not None:
            return chosen_sequences(dataset_json, args.channels)
        sequences_of(dataset_json)
    except JsonFileError as error:
        raise UserError(f"client {client}: {error}. Restore the model folder.") from error
    except SubsetError as error:
        raise UserError(f"client {client}: {error}") from error
    return None


def plan_output(model: Path, images: Path, sequences: Subset | None, every_subset: bool) -> Path:
    """Where label maps or probabilities go unless --output says."""
    predictions, name = model / "predictions", images.resolve().name
    if every_subset:
        return predictions
    return predictions / (name if sequences is None else folder_name(name, sequences))


def plan_classes(
    client: str, site: Mapping, dataset: Path | None, labels: Path | None
) -> tuple[Path | None, str | None]:
    """The data set folder with the true classes of a classification client's cases, and their source; or neither.

    Args:
      client: Site name.
      site: Its entry of results.json.
      dataset: The data set the images belong to; None for images from elsewhere.
      labels: What --labels says.

    Raises:
      UserError: If --labels holds no file of classes.
    """
    if labels is not None and class_file(labels) is None:
        raise UserError(f"client {client}: neither classes.json nor classes.csv in {labels}. Check --labels.")
    if labels is not None:
        return labels, class_file(labels)
    source = (site.get("classes") or class_file(dataset)) if dataset else None
    return (dataset, source) if source else (None, None)


def class_file(dataset: Path) -> str | None:
    """The file of classes in a data set folder, if it has one."""
    return next((name for name in ("classes.json", "classes.csv") if (dataset / name).is_file()), None)


def raw_dataset(workspace: Path, dataset: str) -> Path:
    """The raw data set: in the environment's nnUNet_raw, or else in the workspace, where jobs put cohorts they make.

    Raises:
      UserError: If neither has it.
    """
    named = os.environ.get("nnUNet_raw")
    folders = [Path(named)] if named else []
    folders.append(workspace / "nnUNet_raw")
    for folder in folders:
        if (folder / dataset).is_dir():
            return folder / dataset
    raise UserError(
        f"no data set {dataset} in {' or '.join(map(str, folders))}{'' if named else ', and nnUNet_raw is not set'}. "
        "Set nnUNet_raw to the folder that holds it, or give --input."
    )


def usable_gpus(args: argparse.Namespace) -> list[int]:
    """The GPUs to run on; empty without CUDA, which is said once.

    Raises:
      UserError: If CUDA is there but not these GPUs.
    """
    import torch  # here, as it takes seconds that a wrong command line should not cost

    if not torch.cuda.is_available():
        if not args.one_of_several:
            print("no CUDA device: running on the CPU")
        return []
    count = torch.cuda.device_count()
    absent = [gpu for gpu in args.gpu_ids if not 0 <= gpu < count]
    if absent:
        raise UserError(
            f"--gpu_ids {' '.join(map(str, absent))}: no such GPU; this machine shows {count}, from 0 to {count - 1}."
        )
    return list(dict.fromkeys(args.gpu_ids))


def predict(work: Work, args: argparse.Namespace, gpu: int | None) -> None:
    """Predict one site's cases in this process and score them.

    Raises:
      UserError, DatasetError, EvaluationError, OSError: With the file in question and what to do.
    """
    import torch

    from fedcmt import prediction
    from fedcmt.nnunet.predict import PredictionInputError

    if gpu is not None:
        torch.cuda.set_device(gpu)
    check_writable(work.output)
    classifies = work.task == CLASSIFICATION
    done = "classified" if classifies else "segmented"
    settings = prediction.PredictionSettings(
        device=torch.device("cpu") if gpu is None else torch.device("cuda", gpu),
        checkpoint=f"checkpoint_{args.checkpoint}.pth",
        mirroring=not args.disable_tta,
        progress=lambda count, total: print(f"{work.client}: {count} of {total} cases {done}", flush=True),
    )
    try:
        if classifies:
            prediction.classify(work.model, work.images, work.output, work.labels, work.class_source, settings)
        elif work.every_subset and work.labels is not None:
            prediction.segment_subsets(
                work.model, work.images, work.output, work.labels, settings, score_regions=work.score_regions
            )
        else:
            prediction.segment(
                work.model,
                work.images,
                work.output,
                work.labels,
                settings,
                work.sequences,
                score_regions=work.score_regions,
            )
    except PredictionInputError as error:
        raise UserError(str(error)) from error
    print(f"{work.client}: {'probabilities' if classifies else 'label maps'} in {work.output}", flush=True)


def check_writable(folder: Path) -> None:
    """Raise `UserError` unless files can be written there; creates the folder."""
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}). Give another folder with --output.") from error


def run_side_by_side(works: Sequence[Work], args: argparse.Namespace, gpus: Sequence[int]) -> list[str]:
    """Run each site in a process of its own, as many at a time as there are places; returns the clients that failed."""
    places = [environment_of(gpu) for _ in range(args.sites_per_gpu) for gpu in gpus] or cpu_places(len(works))
    waiting = [work.client for work in works]
    running: dict[subprocess.Popen, tuple[str, dict[str, str]]] = {}
    failed = []
    try:
        while waiting or running:
            while waiting and places:
                client, place = waiting.pop(0), places.pop(0)
                running[subprocess.Popen(child_command(client, args), env=os.environ | place)] = client, place
            for child in [c for c in running if c.poll() is not None]:
                client, place = running.pop(child)
                places.append(place)
                if child.returncode != 0:
                    failed.append(client)
            time.sleep(0.05)
    finally:
        for child in running:
            child.terminate()
        for child in running:
            child.wait()
    return failed


def child_command(client: str, args: argparse.Namespace) -> list[str]:
    """This script for one client; its one visible GPU is number 0."""
    command = [sys.executable, __file__, "--one_of_several", "--workspace", str(args.workspace), "--clients", client]
    command += ["--checkpoint", args.checkpoint]
    if args.channels is not None:
        command.append(f"--channels={','.join(args.channels)}")
    command += ["--every_subset"] * args.every_subset
    return command + ["--disable_tta"] * args.disable_tta + ["--verbose"] * args.verbose


def environment_of(gpu: int) -> dict[str, str]:
    """What makes a child see this GPU alone; ids count within a CUDA_VISIBLE_DEVICES that is already set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[gpu] if visible else str(gpu)}


def cpu_places(num_sites: int) -> list[dict[str, str]]:
    """A place per two cores, at least one and at most one per site, with the cores divided among them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    places = min(num_sites, max(1, cores // 2))
    threads = str(max(1, cores // places))
    names = [
        name for name in ("OMP_NUM_THREADS", "nnUNet_def_n_proc") if name not in os.environ
    ]  # the caller's word counts
    return [dict.fromkeys(names, threads) for _ in range(places)]


def show_scores(works: Sequence[Work], failed: Sequence[str]) -> None:
    """Print a table of the sites that were scored; where every subset was, one for each site."""
    done = [work for work in works if work.client not in failed]
    tests = {
        work.client: {"task": work.task, "test": json.loads((work.output / "metrics.json").read_text())}
        for work in done
        if not work.every_subset and (work.output / "metrics.json").is_file()
    }
    if tests:
        print("\n" + results_table({"sites": tests}), end="")
    for work in done:
        if work.every_subset:
            print(f"\n{work.client}: {(work.output / AS_MARKDOWN).read_text(encoding='utf-8')}", end="")
    if failed:
        print(f"error: {len(failed)} of {len(works)} clients failed: {', '.join(failed)}; see above.", file=sys.stderr)


def complain(args: argparse.Namespace, error: Exception) -> int:
    """Say what is wrong in one line; returns the exit code."""
    whose = f"{args.clients[0]}: " if args.one_of_several else ""
    print(f"error: {whose}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return 2


def run() -> int:
    """`main` as a program: SIGTERM and Ctrl-C leave through ``finally``, so that child processes end too."""
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        return main()
    except KeyboardInterrupt:
        return 130


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(run())
