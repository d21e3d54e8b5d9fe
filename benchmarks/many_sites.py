"""The server's memory and time with many sites: uploads on disk, beside the same rounds with all uploads in memory.

``python benchmarks/many_sites.py`` runs whole federations of sites without images, whose updates are random, and
prints for FedAvg and FedCMT

(a) the peak of resident memory above what the process holds after its imports; below 1.5 GB with uploads on disk, else
    the exit code is 1;
(b) the peak of anonymous memory, without pages of mapped files, which the system may drop at any time;
(c) the server's seconds a round, from the payloads to the stored state, and how often one bare pass that writes the
    round's uploads to files, synchronises and reads them again fits in.

Each way runs in a process of its own, with the setting of the C library's allocator that the launcher gives FLARE's
processes. The sites are in it too: theirs are one model's worth of random numbers and the update that is being made;
the seconds in which they make it are not counted. GB are 10^9 bytes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch

from fedcmt.algorithms.base import Algorithm
from fedcmt.algorithms.fedavg import FedAvg
from fedcmt.algorithms.fedcmt import FedCMT
from fedcmt.config import ServerConfig
from fedcmt.federation import Federation
from fedcmt.messages import Failure, Keep, Message, Task, as_it_is
from fedcmt.models.scopes import ScopeRules
from fedcmt.params import Params
from fedcmt.workspace import MALLOC_VARIABLE

ALGORITHMS: dict[str, type[Algorithm]] = {"FedAvg": FedAvg, "FedCMT": FedCMT}
WAYS = ("on disk", "in memory")
MOST_GB = 1.5
_MMAP_THRESHOLD = {MALLOC_VARIABLE: str(2**20)}
_POLL_SECONDS = 0.01
_GIGABYTE = 1e9
_FIELDS = ("RssAnon", "VmRSS")


def main() -> int:
    """Measure every way in a process of its own, and print; 1 if a target is missed."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    if options.way is not None:
        sys.stdout.write(json.dumps(_run(options)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bare = _bare_pass(Path(folder), options.sites, options.elements)
    print(
        f"{options.sites} sites, {options.elements:,} float32 numbers in {options.tensors} tensors, {options.rounds} "
        f"rounds, {options.threads} threads; a bare pass takes {bare:.2f} s\n"
    )
    print("| algorithm | uploads | resident, GB | anonymous, GB | s a round, median | at best | bare passes |")
    print("|:--|:--|--:|--:|--:|--:|--:|")
    missed = []
    for algorithm in options.algorithms:
        for way in WAYS:
            found = _in_own_process(algorithm, way, options)
            print(_row(algorithm, way, found, bare), flush=True)
            if way == "on disk" and found["VmRSS"] >= MOST_GB:
                missed.append(f"{algorithm} takes {found['VmRSS']:.2f} GB")
    print(f"\nbelow {MOST_GB} GB with uploads on disk: {'; '.join(missed) or 'yes'}")
    return 1 if missed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=32)
    parser.add_argument("--elements", type=int, default=14_000_000, help="float32 numbers per update")
    parser.add_argument("--tensors", type=int, default=48, help="tensors per update")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--algorithms", nargs="+", choices=tuple(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--folder", type=Path, help="for uploads and state; default: the system's for temporary files")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # of a process that measures one way
    return parser


def _row(algorithm: str, way: str, found: Mapping[str, object], bare: float) -> str:
    seconds: list[float] = found["seconds"]  # type: ignore[assignment]
    shown = f"{found['VmRSS']:.2f} | {found['RssAnon']:.2f} | {statistics.median(seconds):.2f} | {min(seconds):.2f}"
    return f"| {algorithm} | {way} | {shown} | {min(seconds) / bare:.2f} |"


def _in_own_process(algorithm: str, way: str, options: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--way", way, "--algorithms", algorithm, "--sites", str(options.sites)]
    command += ["--elements", str(options.elements), "--tensors", str(options.tensors)]
    command += ["--rounds", str(options.rounds), "--threads", str(options.threads)]
    command += ["--folder", str(options.folder)] if options.folder else []
    done = subprocess.run(command, env={**os.environ, **_MMAP_THRESHOLD}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def _bare_pass(folder: Path, num_sites: int, num_elements: int) -> float:
    """Seconds in which as many bytes as a round's uploads go to files, one a site, to the disk, and are read again."""
    numbers = np.random.default_rng(0).standard_normal(num_elements, dtype=np.float32)
    target = np.zeros_like(numbers)
    started = time.perf_counter()
    for site in range(num_sites):
        with (folder / f"{site}.bin").open("wb") as file:
            file.write(numbers.data)
            file.flush()
            os.fsync(file.fileno())
    for site in range(num_sites):
        with (folder / f"{site}.bin").open("rb") as file:
            file.readinto(target.data)
    return time.perf_counter() - started


def _run(options: argparse.Namespace) -> dict[str, object]:
    """One federation of this process: its peaks above now in GB, and the server's seconds of each round."""
    (algorithm,) = options.algorithms
    with peaks() as found, tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model = make_model(options.elements, options.tensors)
        seconds = run_rounds(algorithm, options.way, model, options.sites, options.rounds, Path(folder))
    return {**found, "seconds": seconds}


def run_rounds(algorithm: str, way: str, model: Params, num_sites: int, num_rounds: int, folder: Path) -> list[float]:
    """The server's seconds of each round of a federation of fake sites, which leaves its state in the folder.

    Args:
      algorithm: A key of `ALGORITHMS`.
      way: One of `WAYS`: where the uploads are.
      model: The initial one.
      num_sites: Sites.
      num_rounds: Rounds.
      folder: Of the server.
    """
    sites = FakeSites([f"site{k:02}" for k in range(num_sites)], model)
    seconds: list[float] = []
    federation = Federation(
        ALGORITHMS[algorithm](),
        GivenPlanner(model),
        ServerConfig(num_rounds),
        job="many_sites",
        folder=folder,
        on_round=lambda round_idx, curves: seconds.append(sites.server_seconds()),
    )
    held = patch("fedcmt.federation.SpooledUpdates", HeldUpdates) if way == "in memory" else nullcontext()
    with held:
        federation.run(sites, sites.names)
    return seconds


def make_model(num_elements: int, num_tensors: int) -> Params:
    """Random tensors of an encoder, ``num_elements`` numbers in all; sizes differ as those of layers do."""
    sizes = np.linspace(1, 20, num_tensors) ** 2
    sizes = np.maximum(1, sizes / sizes.sum() * num_elements).astype(int)
    sizes[-1] += num_elements - sizes.sum()
    generator = torch.Generator().manual_seed(0)
    return {
        f"encoder.stages.{1 + k % 5}.t{k:03}": torch.randn(int(size), generator=generator)
        for k, size in enumerate(sizes)
    }


class FakeSites:
    """A channel with the sites in it, which train nothing: updates are random, with a part that all have in common.

    Args:
      names: Of the sites.
      numbers: What the updates are made of; the names and shapes are those of the model.
    """

    def __init__(self, names: list[str], numbers: Params) -> None:
        self.names = names
        self._numbers = numbers
        self._started = 0.0
        self._own_seconds = 0.0

    def exchange(
        self, task: Task, messages: Mapping[str, Message], keep: Keep = as_it_is
    ) -> dict[str, Message | Failure]:
        """One site after the other."""
        if task is Task.TRAIN:
            self._started, self._own_seconds = time.perf_counter(), 0.0
        return {site: keep(site, self._answer(task, site, message)) for site, message in messages.items()}

    def server_seconds(self) -> float:
        """Since the last request to train, without the seconds in which updates were made."""
        return time.perf_counter() - self._started - self._own_seconds

    def _answer(self, task: Task, site: str, message: Message) -> Message:
        said = {"task": task.value, "site": site}
        if task is Task.FINGERPRINT:
            return Message({**said, "fingerprint": {}, "modality": "MR"})
        if task is Task.PREPARE:
            wire = {name: list(tensor.shape) for name, tensor in self._numbers.items()}
            return Message({**said, "channels": ["T1"], "num_cases": 10, "wire_shapes": wire})
        if task is Task.FINISH:
            return Message({**said, "report": {}})
        round_idx = message.meta["round"]
        started = time.perf_counter()
        shift = 1 + 7919 * (self.names.index(site) + len(self.names) * round_idx)
        delta = {name: t.roll(shift).mul_(1e-3).add_(t, alpha=3e-4) for name, t in self._numbers.items()}
        self._own_seconds += time.perf_counter() - started
        return Message({**said, "round": round_idx, "num_steps": 1, "metrics": {"loss": 1.0}}, delta)


class GivenPlanner:
    """Plans nothing; the initial model is given."""

    def __init__(self, initial: Params) -> None:
        self._initial = initial

    def plan(self, fingerprints: Mapping[str, dict], known: Mapping[str, dict]) -> dict[str, dict]:
        """No plans for every site."""
        return {site: {} for site in fingerprints}

    def initial(
        self,
        plans: Mapping[str, dict],
        fingerprints: Mapping[str, dict],
        modalities: Mapping[str, str],
        rules: ScopeRules,
    ) -> Params:
        """The given model."""
        return dict(self._initial)


class HeldUpdates:
    """A round's uploads in memory: the peer of `fedcmt.uploads.SpooledUpdates`, with what of it a federation uses."""

    def __init__(self, folder: Path) -> None:
        pass

    def __enter__(self) -> "HeldUpdates":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def add(self, site: str, tensors: Params) -> Params:
        """The same tensors."""
        return dict(tensors)


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """Peaks of the block's `_FIELDS` in GB above what they were before; filled once it has ended."""
    before, most, done = _status(), _status(), threading.Event()
    found: dict[str, float] = {}

    def look() -> None:
        for name, value in _status().items():
            most[name] = max(most[name], value)

    def watch() -> None:
        while not done.wait(_POLL_SECONDS):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
    look()
    found.update({name: (most[name] - before[name]) / _GIGABYTE for name in _FIELDS})


def _status() -> dict[str, int]:
    """`_FIELDS` of Linux's /proc/self/status in bytes: counters, so that reading them often costs the run little."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    found = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[0].rstrip(":") in _FIELDS}
    if set(found) != set(_FIELDS):
        raise RuntimeError(f"/proc/self/status has {sorted(found)}, expected {_FIELDS}; this needs Linux 4.5 or later")
    return found


if __name__ == "__main__":
    sys.exit(main())
