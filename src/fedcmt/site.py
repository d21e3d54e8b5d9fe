"""The site's half of a federation: receive, train, answer; its data and its personal tensors stay here.

An engine hands each request to `Site.handle` and carries the answer back. All that must survive a restart is on disk
when an answer leaves: what was prepared, the last model with optimiser and random state, and the best model.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fedcmt.algorithms.base import Algorithm
from fedcmt.config import SiteConfig, check_job_name
from fedcmt.data.checks import check_dataset, check_splits, find_dataset, find_splits, read_dataset_json, read_splits
from fedcmt.data.classes import read_classes
from fedcmt.evaluation.regions import with_score_regions
from fedcmt.json_file import read_state, write_state
from fedcmt.messages import Message, Task
from fedcmt.nnunet.fingerprint import Fingerprint, bin_policy
from fedcmt.nnunet.planning_options import PlanningOptions
from fedcmt.nnunet.site_data import own_fingerprint, prepare_data
from fedcmt.params import serialized_size
from fedcmt.privacy.egress import EgressLedger
from fedcmt.privacy.site_half import check_anew, check_cases, site_ledger
from fedcmt.privacy.terms import PrivacyTerms
from fedcmt.progress import Progress
from fedcmt.session import Prepared, Reporter, Session
from fedcmt.whole_cases import site_device
from fedcmt.workspace import THREADS_VARIABLE, environment, nnunet_folder

logger = logging.getLogger(__name__)

_JOINED_FILE = "joined.json"
_JOINED = ("job", "seed", "planning", "privacy", "num_sites", "federation", "fingerprint", "classes")
"""What it holds: the server's introduction, the site's fingerprint in its finest form, and its classes, if any."""
_NUM_FOLDS = 5
"""Of nnU-Net's split, where a data set has none of its own."""
_TRAFFIC = "traffic.json"
_NO_TRAFFIC = {"sent": 0, "received": 0}
"""Bytes of tensors since the run began, over every restart."""


class Site:
    """One data holder.

    Args:
      name: The site's name in the federation.
      config: Its data and local training.
      algorithm: The site's half of the algorithm.
      folder: Where the site keeps its state, ledger and trainer logs; outside anything an engine wipes.
      report: Receives curves.
    """

    def __init__(
        self,
        name: str,
        config: SiteConfig,
        algorithm: Algorithm,
        folder: Path,
        report: Reporter = lambda tag, value, step: None,
    ) -> None:
        self.name = name
        self._config = config
        self._algorithm = algorithm
        self._folder = folder
        self._report = report
        self._ledger = EgressLedger(folder / "egress.jsonl")
        self._session: Session | None = None
        traffic = folder / _TRAFFIC
        self._bytes = read_state(traffic, needs=_NO_TRAFFIC) if traffic.exists() else dict(_NO_TRAFFIC)
        self._stop: Callable[[], bool] = lambda: False

    def handle(self, task: Task, message: Message, stop: Callable[[], bool] = lambda: False) -> Message:
        """Do one task and return the answer; whatever goes wrong is raised, with the reason in the message.

        Args:
          task: What to do.
          message: The request.
          stop: Asked between training steps; true ends the task with `Aborted`.
        """
        self._stop = stop
        self._count("received", message)
        steps = {
            Task.FINGERPRINT: self._fingerprint,
            Task.PREPARE: self._prepare,
            Task.TRAIN: self._train,
            Task.EVALUATE: self._evaluate,
            Task.FINISH: self._finish,
        }
        if THREADS_VARIABLE in os.environ:
            torch.set_num_threads(int(os.environ[THREADS_VARIABLE]))  # equal sums need equal threads in every engine
        with environment(self._loader_variables()):
            done = steps[task](message)
        answer = replace(done, meta={**done.meta, "task": task.value, "site": self.name})
        self._release(task, message, answer)
        return answer

    def close(self) -> None:
        """Stop whatever the trainer started."""
        if self._session is not None:
            self._session.trainer.close()

    def _fingerprint(self, message: Message) -> Message:
        check_job_name(message.meta["job"], "the server's job")
        options = PlanningOptions.from_dict(message.meta["planning"])
        terms = PrivacyTerms.from_dict(message.meta["privacy"], "the job's privacy")
        ledger = site_ledger(terms, self._folder, self.name)
        logger.info("%s: checking %s", self.name, self._dataset.name)
        summary = check_dataset(
            self._dataset,
            num_folds=None if self._config.fold == "all" else _NUM_FOLDS,
            channels=self._config.channels,
            missing_channels=self._config.missing_channels,
        )
        dataset_json = read_dataset_json(self._dataset)
        with_score_regions(dataset_json, self._config.score_regions, f"site {self.name!r}")
        classes = None
        if self._config.task == "classification":
            classes = list(read_classes(self._dataset, dataset_json, self._config.classes).names)
        cases = self._num_training_cases(summary.training_cases)
        check_cases(terms, ledger, site=self.name, num_cases=cases, steps=self._config.local_steps)
        logger.info("%s: extracting the fingerprint", self.name)
        own = own_fingerprint(self._dataset, options)
        said = {**message.meta, "fingerprint": own.to_dict(), "classes": classes}
        write_state(self._folder / _JOINED_FILE, said)
        sent = own.coarsened(bin_policy(options.mode))
        self._note("planning statistics", "counts and moments of images; see docs/privacy.md")
        return Message({"fingerprint": sent.to_dict(), "modality": self._config.modality})

    def _prepare(self, message: Message) -> Message:
        joined = read_state(self._folder / _JOINED_FILE, needs=_JOINED)
        if not message.meta["resume"]:
            check_anew(site_ledger(self._terms, self._folder, self.name), self.name)
        options = PlanningOptions.from_dict(joined["planning"])
        progress = Progress(f"{self.name}: preprocessing", logger)
        plans = prepare_data(
            message.meta["plans"],
            Fingerprint.from_dict(joined["fingerprint"]),
            self._dataset,
            nnunet_folder("nnUNet_preprocessed"),
            options,
            site=self.name,
            role=self._config.role,
            job=joined["job"],
            num_processes=self._config.num_processes,
            progress=progress.update,
        )
        prepared = Prepared(
            plans=plans,
            dataset_json=read_dataset_json(self._dataset),
            configuration=options.configuration,
            seed=joined["seed"],
            num_rounds=message.meta["num_rounds"],
            schedule_rounds=message.meta["schedule_rounds"],
            privacy=joined["privacy"],
            num_sites=joined["num_sites"],
            federation=joined["federation"],
            classes=joined["classes"],
        )
        if message.meta["resume"]:
            self._check_same_data(prepared)
        write_state(self._folder / "prepared.json", asdict(prepared))
        self.close()
        if not message.meta["resume"]:
            for stale in ("previous.safetensors", "last.safetensors", "best.safetensors"):
                (self._folder / stale).unlink(missing_ok=True)
            self._bytes = dict(_NO_TRAFFIC)
        self._session = self._open(prepared)
        self._note("case counts", "number of training cases")
        return Message(
            {
                "channels": self._session.channels,
                "num_cases": self._session.trainer.num_training_cases(),
                "role": self._config.role,
                "wire_shapes": {name: list(shape) for name, shape in self._session.partition.wire_shapes.items()},
                **self._session.sampling(),
            }
        )

    def _check_same_data(self, prepared: Prepared) -> None:
        """Raise ValueError if the state on disk is of other data: its decoder would not mean the same labels."""
        path = self._folder / "prepared.json"
        if not path.exists():
            return
        before, now = _meaning(Prepared.from_file(path)), _meaning(prepared)
        for what, known in before.items():
            if now[what] != known:
                raise ValueError(
                    f"site {self.name!r}: {self._folder} holds the state of a model for {what} {known}, now it is to "
                    f"be {now[what]}. Use the same data, or join under another name."
                )

    def _train(self, message: Message) -> Message:
        return self._ready().train_round(message, self._report, self._stop)

    def _evaluate(self, message: Message) -> Message:
        return self._ready().evaluate(message)

    def _finish(self, message: Message) -> Message:
        session = self._ready()
        report = session.finish(message, nnunet_folder("nnUNet_results"))
        report["bytes_sent"], report["bytes_received"] = self._bytes["sent"], self._bytes["received"]
        self._note("test scores", "means over test cases and whole validation cases")
        return Message({"report": report})

    def _ready(self) -> Session:
        """The running session; after a restart, rebuilt from disk with the personal and optimiser state."""
        if self._session is None:
            self._session = self._open(Prepared.from_file(self._folder / "prepared.json"))
        return self._session

    def _open(self, prepared: Prepared) -> Session:
        return Session(self.name, self._config, self._algorithm, self._folder, self._dataset, prepared)

    @property
    def _terms(self) -> PrivacyTerms:
        """The job's privacy, as the server said it when the site joined."""
        path = self._folder / _JOINED_FILE
        return PrivacyTerms.from_dict(read_state(path, needs=_JOINED)["privacy"], f"{path}: privacy")

    def _note(self, kind: str, detail: str) -> None:
        """Take down in the site's privacy ledger, if it keeps one, that something without noise is about to leave."""
        ledger = site_ledger(self._terms, self._folder, self.name)
        if ledger is not None:
            ledger.note(kind, None, detail, site=self.name)

    def _num_training_cases(self, cases: Sequence[str]) -> int:
        """Cases that the site's fold will train on, of those in imagesTr, before anything is preprocessed.

        Raises:
          DatasetError: If the split is damaged, lacks the fold, or names other cases.
        """
        fold = self._config.fold
        if fold == "all":
            return len(cases)
        file = find_splits(self._dataset, nnunet_folder("nnUNet_preprocessed"))
        if file is None:
            return len(cases) - len(range(fold, len(cases), _NUM_FOLDS))
        check_splits(file, cases, fold)
        return len(read_splits(file)[fold]["train"])

    def _release(self, task: Task, message: Message, answer: Message) -> None:
        """Check, record and count the answer."""
        partition = None if self._session is None else self._session.partition
        self._ledger.release(
            answer.tensors,
            answer.meta,
            allowed=partition.wire_shapes if partition else (),
            task=task.value,
            round_idx=message.meta.get("round"),
            extras=answer.extras,
            personal=partition.personal if partition else (),
        )
        self._count("sent", answer)
        write_state(self._folder / _TRAFFIC, self._bytes)

    def _count(self, direction: str, message: Message) -> None:
        for tensors in (message.tensors, message.extras):
            self._bytes[direction] += serialized_size(tensors)[1] if tensors else 0

    @property
    def _dataset(self) -> Path:
        return find_dataset(nnunet_folder("nnUNet_raw"), self._config.dataset_id)

    def _loader_variables(self) -> dict[str, str]:
        """nnU-Net reads the number of its loader processes from the environment; without a GPU, none repeats a run."""
        workers = self._config.num_workers
        if workers is None and (site_device(self._config).type == "cpu" or self._draws_cases()):
            workers = 0
        return {} if workers is None else {"nnUNet_n_proc_DA": str(workers)}

    def _draws_cases(self) -> bool:
        """Whether each step draws its cases, which loader processes would do ahead of it."""
        return (self._folder / _JOINED_FILE).exists() and self._terms.mode == "instance_dp"


def _meaning(prepared: Prepared) -> dict[str, Any]:
    """What a site's inputs and outputs stand for, by the name that an error gives it; classes in their order."""
    dataset_json = prepared.dataset_json
    return {
        "data set": prepared.plans["dataset_name"],
        "task": "segmentation" if prepared.classes is None else "classification",
        "list of classes": prepared.classes,
        "dataset.json: labels": dataset_json["labels"],
        "dataset.json: regions_class_order": dataset_json.get("regions_class_order"),
        "dataset.json: channel_names": dataset_json["channel_names"],
    }
