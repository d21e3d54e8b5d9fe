"""One real case preprocessed, and a few real training steps on it, in a temporary folder: what they take here."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch

from fedcmt.data.checks import list_training_cases
from fedcmt.data.classes import UNKNOWN
from fedcmt.doctor.job import JobSite, SitePlan
from fedcmt.json_file import write_json
from fedcmt.nnunet.classifier import classifier_of
from fedcmt.nnunet.fingerprint import to_nnunet
from fedcmt.nnunet.paths import nnunet_paths
from fedcmt.nnunet.preprocess import install_plans, preprocess_dataset
from fedcmt.nnunet.trainer import SiteTrainer, build_trainer
from fedcmt.randomness import RandomStream
from fedcmt.workspace import environment

TIMED_STEPS = 2
_POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Attributes:
      case: The case it was measured on.
      device: "cpu" or "cuda".
      threads: CPU threads of a step.
      preprocess_seconds: Of the case.
      preprocessed_bytes: Of the case's files, compressed.
      step_seconds: Loading, augmentation in this process, and the step.
      loading_seconds: The part of it that loader processes would do beside.
      validation_seconds: Per batch of validation patches.
      memory_bytes: Peak of training above what the process held before it; on a GPU its peak there.
    """

    case: str
    device: str
    threads: int
    preprocess_seconds: float
    preprocessed_bytes: int
    step_seconds: float
    loading_seconds: float
    validation_seconds: float
    memory_bytes: int


def measure(asked: JobSite, plan: SitePlan, case: str, device: torch.device) -> Measurement:
    """Preprocess one training case and train on it as the site would; the global random numbers are left alone.

    Args:
      asked: The job.
      plan: The site's.
      case: Id of a training case, of known class where the site classifies.
      device: Where to train.
    """
    variables = {"nnUNet_n_proc_DA": "0"}
    with TemporaryDirectory(prefix="fedcmt-doctor-") as folder, environment(variables), RandomStream(0).active():
        root = Path(folder)
        dataset = _one_case(plan, case, root / "raw")
        install_plans(plan.plans, dataset, root / "preprocessed", to_nnunet(plan.fingerprint))
        started = time.monotonic()
        made = preprocess_dataset(plan.plans, plan.configuration, dataset, root / "preprocessed")
        preprocess_seconds = time.monotonic() - started
        with nnunet_paths(preprocessed=root / "preprocessed", results=root / "results"), _peak_memory(device) as peak:
            trainer = _trainer(asked, plan, device)
            step, loading, validation = _timed(trainer)
            trainer.close()
        return Measurement(
            case=case,
            device=device.type,
            threads=torch.get_num_threads(),
            preprocess_seconds=preprocess_seconds,
            preprocessed_bytes=sum(file.stat().st_size for file in made.iterdir()),
            step_seconds=step,
            loading_seconds=loading,
            validation_seconds=validation,
            memory_bytes=peak[0],
        )


def a_case(plan: SitePlan) -> str:
    """The training case, of known class if there are classes, whose image file is of median size."""
    cases = list_training_cases(plan.dataset, plan.dataset_json)
    known = [name for name in cases if plan.classes is None or plan.classes.cases[name] != UNKNOWN]
    return sorted(known, key=lambda name: cases[name].images[0].stat().st_size)[len(known) // 2]


def _one_case(plan: SitePlan, case: str, raw: Path) -> Path:
    """A data set of links to one case."""
    files = list_training_cases(plan.dataset, plan.dataset_json)[case]
    folder = raw / plan.dataset.name
    for part, paths in (("imagesTr", files.images), ("labelsTr", (files.label,))):
        (folder / part).mkdir(parents=True)
        for path in paths:
            (folder / part / path.name).symlink_to(path.resolve())
    write_json(folder / "dataset.json", {**plan.dataset_json, "numTraining": 1})
    return folder


def _trainer(asked: JobSite, plan: SitePlan, device: torch.device) -> SiteTrainer:
    config = asked.config
    return build_trainer(
        plan.plans,
        plan.dataset_json,
        configuration=plan.configuration,
        fold="all",
        device=device,
        optimizer=config.optimizer,
        grad_clip=config.grad_clip,
        total_steps=1 + TIMED_STEPS,
        seed=0,
        mirror_axes=config.mirror_axes,
        missing_channels=config.missing_channels,
        loss=config.loss,
        make=SiteTrainer if plan.classes is None else classifier_of(plan.classes),
    )


def _timed(trainer: SiteTrainer) -> tuple[float, float, float]:
    """Seconds of a step, of loading alone, and of validating a batch."""
    trainer.train_steps(1, None)  # not timed: it sets things up
    started = time.monotonic()
    trainer.train_steps(TIMED_STEPS, None)
    trained = time.monotonic()
    next(trainer.dataloader_train)
    loaded = time.monotonic()
    trainer.validate(1)
    return (trained - started) / TIMED_STEPS, loaded - trained, time.monotonic() - loaded


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Bytes that the block takes at most beyond what was taken before, as the only item once it has ended."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak[0] = torch.cuda.max_memory_reserved()
        return
    process, stop = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not stop.wait(_POLL_SECONDS):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
