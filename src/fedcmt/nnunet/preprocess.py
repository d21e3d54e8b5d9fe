"""nnU-Net's preprocessing of one site's data: done once per data identifier, resumable, safe with several processes."""

import json
import logging
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from fedcmt.data.checks import SPLITS_FILE, Case, list_training_cases, read_dataset_json
from fedcmt.file_lock import exclusive
from fedcmt.json_file import JsonFileError, read_json, write_json
from fedcmt.nnunet.normalization import with_own_schemes

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the cases done and the cases in all."""


def install_plans(
    plans: Mapping[str, Any], dataset_folder: Path, preprocessed: Path, fingerprint: Mapping[str, Any]
) -> Path:
    """Put plans where nnU-Net's trainer looks for them, and beside them the data set's own split if it has one.

    Args:
      plans: Localised plans.
      dataset_folder: The data set in nnU-Net raw form.
      preprocessed: What nnU-Net calls ``nnUNet_preprocessed``.
      fingerprint: `to_nnunet` of the fingerprint that the plans were made from.

    Returns:
      The plans file. Each file is replaced as a whole, so a reader never sees half of one.

    Raises:
      DatasetError: If dataset.json is missing or breaks nnU-Net's format.
    """
    folder = preprocessed / plans["dataset_name"]
    plans_file = folder / f"{plans['plans_name']}.json"
    write_json(folder / "dataset.json", read_dataset_json(dataset_folder), indent=2)
    write_json(folder / "dataset_fingerprint.json", fingerprint, indent=2)
    write_json(plans_file, plans, indent=2)
    own_split = dataset_folder / SPLITS_FILE
    if own_split.is_file():  # the data set's own validation cases; nnU-Net would draw five folds
        shutil.copyfile(own_split, folder / own_split.name)
    return plans_file


def preprocess_dataset(
    plans: Mapping[str, Any],
    configuration: str,
    dataset_folder: Path,
    preprocessed: Path,
    *,
    num_processes: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Preprocess all training cases with nnU-Net's preprocessor, unless that was done before.

    The result appears under its final name only when it is complete; ``<identifier>.complete.json`` beside it (nnU-Net
    refuses foreign files inside) records the raw files it was made from. Interrupted work goes on where it stopped. If
    a raw file has changed since, everything is done again. Labels are copied to ``gt_segmentations`` for validation.

    Args:
      plans: Localised plans.
      configuration: E.g. "3d_fullres".
      dataset_folder: The data set in nnU-Net raw form.
      preprocessed: What nnU-Net calls ``nnUNet_preprocessed``.
      num_processes: 1 works in this process; more start fresh processes, for which the main script must be importable.
      progress: Told after each case.

    Returns:
      The folder of preprocessed cases.

    Raises:
      DatasetError: If dataset.json, an image or a label is missing or wrong, naming all of them.
      ValueError: If ``num_processes`` is below 1.
      RuntimeError: If a case cannot be preprocessed, naming it.
    """
    if num_processes < 1:
        raise ValueError(f"preprocess: num_processes is {num_processes}, expected at least 1")
    dataset_json = read_dataset_json(dataset_folder)
    cases = list_training_cases(dataset_folder, dataset_json)
    folder = preprocessed / plans["dataset_name"]
    identifier = PlansManager(dict(plans)).get_configuration(configuration).data_identifier
    final, marker = folder / identifier, folder / f"{identifier}.complete.json"
    source = _source(cases)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(
        folder / "fedcmt.lock",
        on_wait=lambda: logger.info("preprocess: waiting for another site that preprocesses into %s", folder),
    ):
        _copy_labels(cases, dataset_json["file_ending"], folder / "gt_segmentations")
        if final.is_dir() and _records(marker, source):
            logger.info("preprocess: %s is complete (%d cases), reused", final, len(cases))
            return final
        # First the marker: were the folder removed first, a crash in between would leave a marker of nothing.
        marker.unlink(missing_ok=True)
        partial = _Partial(folder / f"{identifier}.partial", source)
        todo = {name: case for name, case in cases.items() if name not in partial.done}
        logger.info("preprocess: %d of %d cases to do in %s", len(todo), len(cases), partial.folder)
        for name in _preprocess(plans, configuration, todo, dataset_json, partial.folder, num_processes):
            partial.add(name)
            if progress is not None:
                progress(len(partial.done), len(cases))
        if final.exists():
            shutil.rmtree(final)
        partial.folder.replace(final)
        write_json(marker, source, indent=2)
        partial.log.unlink()
    return final


class _Partial:
    """Cases that are finished before all are, with a log beside their folder that says which and from what.

    Only logged cases count: a case whose files are there but not logged may be torn, and is done again.
    """

    def __init__(self, folder: Path, source: Mapping[str, Any]) -> None:
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.jsonl")
        self.done = self._read(source)
        if not self.done and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_torn()
        # Written anew, because the last line may be torn and would spoil the next.
        self.log.write_text("".join(json.dumps(line) + "\n" for line in (source, *sorted(self.done))))

    def add(self, name: str) -> None:
        """Log a finished case."""
        with self.log.open("a") as log:
            log.write(json.dumps(name) + "\n")
        self.done.add(name)

    def _read(self, source: Mapping[str, Any]) -> set[str]:
        if not (self.folder.is_dir() and self.log.is_file()):
            return set()
        # Lines without an end were being written when the work stopped.
        lines = [line for line in self.log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if not lines or json.loads(lines[0]) != source:
            return set()
        return {json.loads(line) for line in lines[1:]}

    def _remove_torn(self) -> None:
        """Remove files of cases that are not logged; blosc2 refuses to write over them."""
        whole = {f"{name}{ending}" for name in self.done for ending in (".b2nd", "_seg.b2nd", ".pkl")}
        for path in self.folder.iterdir():
            if path.name not in whole:
                path.unlink()


def _preprocess(
    plans: Mapping[str, Any],
    configuration: str,
    cases: Mapping[str, Case],
    dataset_json: dict,
    folder: Path,
    num_processes: int,
) -> Iterator[str]:
    """Yield each case's name as soon as its files are written."""
    if num_processes == 1:
        for name, case in cases.items():
            yield _preprocess_case(plans, configuration, name, case, dataset_json, folder)
        return
    # Spawned, not forked: a process with threads or CUDA (a running FLARE client) cannot be forked safely.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_processes, max(1, len(cases))), mp_context=context) as pool:
        futures = [
            pool.submit(_preprocess_case, plans, configuration, n, c, dataset_json, folder) for n, c in cases.items()
        ]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"preprocess: a process ended without a word while writing {folder}, most likely for lack of memory. "
                f"Use fewer processes than {num_processes}; finished cases are kept."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _preprocess_case(
    plans: Mapping[str, Any], configuration: str, name: str, case: Case, dataset_json: dict, folder: Path
) -> str:
    manager = PlansManager(dict(plans))
    chosen = with_own_schemes(manager.get_configuration(configuration))
    images = [str(path) for path in case.images]
    try:
        chosen.preprocessor_class(verbose=False).run_case_save(
            str(folder / name), images, str(case.label), manager, chosen, dataset_json
        )
    except (AssertionError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"preprocess: case {name!r} ({images}, {case.label}) failed: {type(error).__name__}: {error}. Check that "
            "images and label have one shape and hold no NaN (nnUNetv2_plan_and_preprocess --verify_dataset_integrity)."
        ) from error
    return name


def _source(cases: Mapping[str, Case]) -> dict[str, Any]:
    """What preprocessed cases were made from: raw files by size and time, and the nnU-Net that read them."""
    states = {}
    for name, case in cases.items():
        stats = [(path.name, path.stat()) for path in (*case.images, case.label)]
        states[name] = [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    return {"nnunetv2": version("nnunetv2"), "cases": states}


def _copy_labels(cases: Mapping[str, Case], file_ending: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in cases.items():
        target, stat = folder / f"{name}{file_ending}", case.label.stat()
        if target.is_file() and (target.stat().st_size, target.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            continue
        temporary = folder / f"{target.name}.tmp"
        shutil.copy2(case.label, temporary)
        temporary.replace(target)


def _records(marker: Path, source: Mapping[str, Any]) -> bool:
    try:
        return read_json(marker) == source
    except JsonFileError:
        return False
