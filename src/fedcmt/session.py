"""A prepared site: its trainer, what of its network travels, and the models it keeps on disk."""

import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch

from fedcmt.algorithms.base import Algorithm, LocalStep
from fedcmt.config import SiteConfig
from fedcmt.data.classes import read_classes
from fedcmt.json_file import read_state
from fedcmt.logs import root_logger_unchanged
from fedcmt.messages import Message
from fedcmt.models.scopes import Partition
from fedcmt.nnunet.classifier import classifier_of
from fedcmt.nnunet.export import export_model_folder, model_folder
from fedcmt.nnunet.network import input_parameters
from fedcmt.nnunet.paths import nnunet_paths
from fedcmt.nnunet.teacher import Teacher
from fedcmt.nnunet.trainer import Batch, LossHook, SiteTrainer, build_trainer
from fedcmt.params import (
    Params,
    Tensors,
    copy_into,
    delta,
    load_newest,
    load_tensors,
    put_rows,
    save_tensors,
    shapes,
    snapshot,
    take_rows,
)
from fedcmt.privacy.server_half import noise_source
from fedcmt.privacy.site_half import SitePrivacy
from fedcmt.privacy.terms import PrivacyTerms
from fedcmt.progress import Progress
from fedcmt.randomness import RandomStream, derive_seed
from fedcmt.settings import read_settings
from fedcmt.whole_cases import WholeCases, site_device
from fedcmt.wire import encode

logger = logging.getLogger(__name__)

_LAST = "last.safetensors"
_PREVIOUS = "previous.safetensors"
"""The state before the one in `_LAST`: a server that was killed in a round asks for that round again."""
_STATE_VALUES = ("round", "optimizer", "random", "best_score", "scores")
"""What a state that a site can go on from says besides its tensors."""
_BEST = "best.safetensors"
_HEADS = re.compile(r"(?:^|\.)(?:seg_layers|head)\.")
"""Names of output layers: in nnU-Net's networks, and in `fedcmt.models`."""

Reporter = Callable[[str, float, int], None]
"""(tag, value, round): one point of a TensorBoard curve."""


class DivergedError(RuntimeError):
    """A round's training gave numbers that are not finite; the site went back to the model of the round before."""


class RoundGoneError(RuntimeError):
    """The server asks for a round whose start the site no longer has."""


class Aborted(RuntimeError):
    """The engine asked the site to stop."""


@dataclass(frozen=True)
class Prepared:
    """All a session is built from, as stored in ``prepared.json``.

    Attributes:
      plans: The site's localised nnU-Net plans.
      dataset_json: The site's dataset.json.
      configuration: E.g. "3d_fullres".
      seed: The job's.
      num_rounds: The job's.
      schedule_rounds: Rounds over which the learning rate decays and distillation ramps up.
      privacy: The job's, as `fedcmt.privacy.terms.PrivacyTerms.to_dict` gives it.
      num_sites: Sites of the job.
      federation: The id that the server gave it.
      classes: Names of the classes in the order of the network's outputs; null where the site segments.
    """

    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str
    seed: int
    num_rounds: int
    schedule_rounds: int
    privacy: dict[str, Any] = field(default_factory=dict)
    num_sites: int = 1
    federation: str = ""
    classes: list[str] | None = None

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read ``prepared.json``.

        Raises:
          JsonFileError: If the file cannot be read, is damaged, or lacks a key.
          TypeError: If a key is unknown.
        """
        return read_settings(cls, read_state(path, needs=[key.name for key in fields(cls)]), str(path))


class Session:
    """A prepared site: trainer, partition, random stream, and the models it keeps."""

    def __init__(
        self, name: str, config: SiteConfig, algorithm: Algorithm, folder: Path, dataset: Path, prepared: Prepared
    ) -> None:
        self._name = name
        self._config = config
        self._algorithm = algorithm
        self._folder = folder
        self._dataset = dataset
        self._prepared = prepared
        self._owner = {"site": name, "federation": prepared.federation}
        self._random = RandomStream(derive_seed(prepared.seed, "site", name))
        self._classes = None
        if config.task == "classification":
            self._classes = read_classes(dataset, prepared.dataset_json, config.classes)
        terms = PrivacyTerms.from_dict(prepared.privacy, f"{folder / 'prepared.json'}: privacy")
        with nnunet_paths(results=folder / "trainer"), self._random.active():
            self.trainer = build_trainer(
                prepared.plans,
                prepared.dataset_json,
                configuration=prepared.configuration,
                fold=config.fold,
                device=site_device(config),
                optimizer=config.optimizer,
                grad_clip=config.grad_clip,
                total_steps=config.local_steps * prepared.schedule_rounds,
                steps_per_round=config.local_steps,
                seed=derive_seed(prepared.seed, "network"),
                mirror_axes=config.mirror_axes,
                missing_channels=config.missing_channels,
                loss=config.loss,
                make=self._trainer_class(terms),
            )
        names = prepared.dataset_json["channel_names"]
        self.channels = [names[str(c)] for c in range(len(names))]
        self.partition = Partition(
            algorithm.scopes,
            shapes(snapshot(self.trainer.module)),
            modality=config.modality,
            channels=self.channels,
            input_parameters=input_parameters(self.trainer.module),
        )
        self._teacher: Teacher | None = None
        self._best_score = -1.0
        self._scores: dict[str, float] = {}
        self._last_round: int
        if (folder / _LAST).exists() or (folder / _PREVIOUS).exists():
            self._restore()
            logger.info("%s: continuing from %s", name, folder)
        else:
            self._save_last(-1)
        self._privacy = SitePrivacy(
            terms,
            name=name,
            folder=folder,
            seed=prepared.seed,
            num_sites=prepared.num_sites,
            sampling_rate=self.trainer.sampling_rate,
            rounds_done=self._last_round + 1,
            steps=config.local_steps,
        )

    def sampling(self) -> dict[str, dict[str, float | int]]:
        """How the server is to account for a round of ``instance_dp``; empty in other modes."""
        rate = self.trainer.sampling_rate
        return {} if rate is None else {"sampling": {"rate": rate, "steps": self._config.local_steps}}

    def train_round(self, message: Message, report: Reporter, stop: Callable[[], bool]) -> Message:
        """One round: load what was received, validate it, train, validate again, keep, and return the delta.

        The last round may be asked for again, by a server that was killed before it kept that round: the site then
        trains from where it stood before it. Its privacy ledger counts both times.

        Raises:
          RoundGoneError: If the site's state is more than one of its rounds ahead of the one asked for.
          DivergedError: If the loss is not finite.
          Aborted: If the engine asked for it.
          ParameterError: If the payload is not what this site exchanges.
        """
        round_idx = message.meta["round"]
        self._go_back_to_start_of(round_idx)
        self._privacy.open_round(round_idx)
        self.trainer.noise = noise_source(self._privacy.terms, self._prepared.seed, "site", self._name, round_idx)
        self.trainer.round_idx = round_idx
        try:
            with self._random.active():
                received = self._whole(message)
                metrics, seconds = self._train(received, message, round_idx, stop)
            sent = self._outgoing(received, message, round_idx)
            self._save_last(round_idx)
        except BaseException:
            self._restore()  # or half a round would stay in the personal part and in the optimiser
            raise
        shares_metrics = self._privacy.terms.shares_metrics
        released = metrics if shares_metrics else {}
        for tag, value in {**released, "learning_rate": self.trainer.learning_rate}.items():
            report(tag, value, round_idx)
        values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        logger.info("%s: round %d: %s", self._name, round_idx + 1, values)
        meta = {"round": round_idx, "num_steps": self._config.local_steps, "metrics": released}
        if shares_metrics:  # under `instance_dp` the time tells how many cases were drawn
            meta["train_seconds"] = seconds
        return Message(meta, *sent)

    def _outgoing(self, received: Tensors, message: Message, round_idx: int) -> tuple[Params, Params]:
        """The update as the job's privacy lets it leave, in the type the server asked for, and the extras."""
        update = delta(self.partition.outgoing(snapshot(self.trainer.module)), received)
        trained = {name: tensor for name, tensor in update.items() if name not in message.meta["frozen"]}
        sent = take_rows(trained, message.meta.get("rows", {}))
        extras = self._algorithm.local_extras(self.trainer.module)
        seed = derive_seed(self._prepared.seed, "wire", self._name, round_idx)
        covered = self._privacy.outgoing(sent, extras, round_idx)
        return encode(covered, message.meta.get("update_dtype", "float32"), seed=seed), extras

    def _train(
        self, wire: Tensors, message: Message, round_idx: int, stop: Callable[[], bool]
    ) -> tuple[dict[str, float], float]:
        """Metrics of a round and the seconds its steps took."""
        received = self._receive(wire)
        self._algorithm.local_start(self.trainer.module, message.extras)
        metrics = self._validate("received", round_idx)
        if self._config.optimizer.reset:
            self.trainer.forget()
        hook, on_step = self._hook(received, message.extras, round_idx), self._on_step(received, round_idx, stop)
        started = time.monotonic()
        frozen = message.meta["frozen"]
        with self.trainer.frozen(self.partition.parameters_of(frozen), self.partition.channels_of(frozen)):
            loss = self.trainer.train_steps(self._config.local_steps, hook, on_step)
        seconds = time.monotonic() - started
        if not math.isfinite(loss):
            raise DivergedError(
                f"{self._name}: the loss of round {round_idx + 1} is not finite; the last good model is kept. "
                "Lower optimizer.lr or grad_clip."
            )
        return metrics | self._validate("trained", round_idx) | {"loss": loss}, seconds

    def evaluate(self, message: Message) -> Message:
        """Score received tensors with this site's personal ones on its validation patches; then all is as it was.

        The answer says what the outputs mean, or None where the output layers are the site's own.

        Raises:
          ParameterError: If the payload is not what this site exchanges.
          PrivacyError: If the job's privacy does not cover scores.
        """
        self._privacy.check_scoring()
        network, own = self.trainer.network, snapshot(self.trainer.module)
        training = network.training
        try:
            self._receive(self._whole(message))
            score = self.trainer.validate(self._config.val_batches)
        finally:
            copy_into(self.trainer.module, own, where=f"site {self._name!r}")
            network.train(training)
        return Message({"round": message.meta["round"], "score": score, "outputs": self._outputs()})

    def _outputs(self) -> dict[str, Any] | None:
        """The task, and labels or classes by name; None if every output layer is personal."""
        heads = {name for name in self.partition.scopes if _HEADS.search(name)}
        if heads and heads <= self.partition.personal:
            return None
        if self._classes is not None:
            return {"task": self._config.task, "classes": list(self._classes.names)}
        dataset_json = self._prepared.dataset_json
        regions = dataset_json.get("regions_class_order")
        return {"task": self._config.task, "labels": dataset_json["labels"], "regions_class_order": regions}

    def finish(self, message: Message, results: Path) -> dict[str, Any]:
        """Validate and test on whole volumes, and export the stock model folder."""
        if message.tensors:
            with self._random.active():
                self._receive(self._whole(message))
                self._validate("received", self._prepared.num_rounds)
        plans, dataset_json = self._prepared.plans, self._prepared.dataset_json
        final = snapshot(self.trainer.module)
        best_file = self._folder / _BEST
        best = load_tensors(best_file, expects=self._owner)[0] if best_file.exists() else final
        folder = export_model_folder(
            model_folder(results, plans, self._prepared.configuration),
            plans=plans,
            dataset_json=dataset_json,
            configuration=self._prepared.configuration,
            mirroring_axes=self.trainer.inference_allowed_mirroring_axes,
            checkpoints={"final": final, "best": best},
            classes=None if self._classes is None else self._classes.names,
        )
        scored = WholeCases(self._name, self._config, self._classes, folder, self._dataset, self._folder)
        validation = None
        if self._config.fold != "all":
            validation = scored.scores("Tr", self.trainer.validation_cases()[1])
        test = _score_split(scored, "Ts")
        common = _score_split(scored, "Common") if self._config.score_common else None
        return {
            "task": self._config.task,
            **({"classes": self._config.classes} if self._config.task == "classification" else {}),
            **({"score_regions": self._config.score_regions} if self._config.score_regions else {}),
            "dataset": self._dataset.name,
            "model_folder": str(folder.relative_to(results)),
            "steps": self.trainer.steps_done,
            "validation_patches": {"score": self.trainer.score, **self._first_and_last()},
            "validation": validation,
            "test": test,
            **({"common": common} if common else {}),
        }

    def _first_and_last(self) -> dict[str, float]:
        """Scores on validation patches before the first step and after the last, if the job's privacy lets them go."""
        return dict(self._scores) if self._privacy.terms.shares_metrics else {}

    def _trainer_class(self, terms: PrivacyTerms) -> Callable[..., SiteTrainer]:
        """The trainer of the site's task, or of ``instance_dp``."""
        if terms.mode != "instance_dp":
            return SiteTrainer if self._classes is None else classifier_of(self._classes)
        with root_logger_unchanged():  # Opacus sets it up when it is imported
            from fedcmt.nnunet.private_trainer import InstancePrivacy, private_trainer_of

        assert terms.noise_multiplier is not None
        assert terms.expected_batch is not None
        noise = noise_source(terms, self._prepared.seed, "site", self._name)  # each round brings its own
        return private_trainer_of(InstancePrivacy(terms.clip, terms.noise_multiplier, terms.expected_batch, noise))

    def _whole(self, message: Message) -> Tensors:
        """A payload's wire tensors with the site's own values in rows that did not travel."""
        rows = message.meta.get("rows", {})
        if not rows:
            return message.tensors
        own = self.partition.outgoing(snapshot(self.trainer.module))
        return put_rows(own, message.tensors, rows, where=f"payload of site {self._name!r}")

    def _receive(self, wire: Tensors) -> Params:
        """Copy whole wire tensors into the network; returns them by parameter name on the network's device."""
        tensors = self.partition.incoming(wire)
        copy_into(self.trainer.module, tensors, where=f"site {self._name!r}")
        return {name: tensor.to(self.trainer.device) for name, tensor in tensors.items()}

    def _hook(self, received: Params, extras: Params, round_idx: int) -> LossHook:
        """The algorithm's term of the local loss, for one round; a site's first is its round 0, whenever it joined:
        its decoder has learned nothing yet that could teach."""
        round_idx = 0 if self._last_round < 0 else round_idx
        teacher, num_rounds = self._teacher_of(round_idx), self._prepared.schedule_rounds

        def hook(loss: torch.Tensor, batch: Batch) -> torch.Tensor:
            step = LocalStep(
                network=self.trainer.module,
                data=batch.data,
                logits=batch.logits,
                target=batch.target,
                valid=batch.valid,
                regions=self.trainer.regions,
                teacher=lambda: teacher(batch.data),
                received=received,
                extras=extras,
                round_idx=round_idx,
                num_rounds=num_rounds,
                output=batch.output,
                cases=batch.cases,
            )
            return self._algorithm.local_loss(loss, step)

        return hook

    def _teacher_of(self, round_idx: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The network as it is now, as a function from patches to logits; call it before the round's first step."""
        if not self._algorithm.needs_teacher(round_idx, self._prepared.schedule_rounds):

            def none(data: torch.Tensor) -> torch.Tensor:
                name = type(self._algorithm).__name__
                raise RuntimeError(f"{name}: local_loss wants a teacher, but needs_teacher said no")

            return none
        if self._teacher is None:
            self._teacher = Teacher(self.trainer)
        self._teacher.follow()
        return self._teacher.logits

    def _validate(self, which: str, round_idx: int) -> dict[str, float]:
        """Validate now if it is this round's turn, and keep the best of the models the algorithm ends with."""
        last = round_idx >= self._prepared.num_rounds - 1
        if not last and round_idx % self._config.val_every:
            return {}
        score = self.trainer.validate(self._config.val_batches)
        self._scores.setdefault("first", score)  # of a network that has not been trained here yet
        self._scores["last"] = score
        if which == self._algorithm.product and score > self._best_score:
            self._best_score = score
            meta = {"round": round_idx, "val_score": score, **self._owner}
            save_tensors(self._folder / _BEST, snapshot(self.trainer.module), meta)
        return {f"val_{self.trainer.score}_{which}": score}

    def _on_step(self, received: Params, round_idx: int, stop: Callable[[], bool]) -> Callable[[int, float], None]:
        exchanged = {name: p for name, p in self.trainer.module.named_parameters() if name in received}
        progress = Progress(f"{self._name}: round {round_idx + 1}/{self._prepared.num_rounds}", logger)

        def on_step(step: int, loss: float) -> None:
            if stop():
                raise Aborted(f"{self._name}: aborted in round {round_idx + 1} at step {step}")
            self._privacy.after_step(exchanged, received)
            progress.update(step, self._config.local_steps, f"loss {loss:.4f}")

        return on_step

    def _go_back_to_start_of(self, round_idx: int) -> None:
        """Undo the site's last round if it is asked for again.

        Raises:
          RoundGoneError: If that would not be enough.
        """
        if round_idx > self._last_round:
            return
        previous = self._folder / _PREVIOUS
        kept = load_tensors(previous)[1]["round"] if previous.exists() else self._last_round
        if kept >= round_idx:
            raise RoundGoneError(
                f"{self._name}: the server asks for round {round_idx + 1}, this site has trained round "
                f"{self._last_round + 1} and keeps no state from before round {round_idx + 1}. Resume with the "
                f"server's newest state, or start anew; the site's files are in {self._folder}."
            )
        logger.info("%s: round %d is asked for again; going back to the state before it", self._name, round_idx + 1)
        previous.replace(self._folder / _LAST)
        self._restore()

    def _save_last(self, round_idx: int) -> None:
        """Model, optimiser and random state of one moment, in one file; the one before it is kept too."""
        optimizer, optimizer_plain = self.trainer.export_state()
        random_tensors, random_plain = self._random.export()
        tensors = {f"network/{n}": t for n, t in snapshot(self.trainer.module).items()}
        tensors |= {f"optimizer/{n}": t for n, t in optimizer.items()}
        tensors |= {f"random/{n}": t for n, t in random_tensors.items()}
        remembered, plain = self._algorithm.local_state()
        tensors |= {f"algorithm/{n}": t for n, t in remembered.items()}
        meta = {"optimizer": optimizer_plain, "random": random_plain, "best_score": self._best_score}
        meta |= {"scores": self._scores, "algorithm": plain, **self._owner}
        last, previous = self._folder / _LAST, self._folder / _PREVIOUS
        save_tensors(last, tensors, {"round": round_idx, **meta}, before=previous)
        self._last_round = round_idx

    def _restore(self) -> None:
        """Go back to what `_save_last` stored; where that is damaged or was not completed, to what it stored before."""
        path = self._folder / _LAST
        tensors, meta = load_newest(path, self._folder / _PREVIOUS, needs=_STATE_VALUES, expects=self._owner)
        parts: dict[str, Params] = {"network": {}, "optimizer": {}, "random": {}, "algorithm": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = tensor
        copy_into(self.trainer.module, parts["network"], where=str(path))
        self.trainer.load_state(parts["optimizer"], meta["optimizer"])
        self._random.load(parts["random"], meta["random"])
        self._algorithm.restore_local(parts["algorithm"], meta.get("algorithm", {}))
        self._best_score = meta["best_score"]
        self._scores = dict(meta["scores"])
        self._last_round = int(meta["round"])


def _score_split(cases: WholeCases, split: str) -> dict[str, Any] | None:
    """Of the test cases of a split that have a reference; None where there are none."""
    labelled = cases.labelled(split)
    return cases.scores(split, labelled) if labelled else None
