"""A site in a process of its own: the same answers, and nothing but its task is lost when the process dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from fedcmt.algorithms.fedcmt import FedCMT
from fedcmt.config import OptimizerConfig, SiteConfig
from fedcmt.messages import Failure, Message, Task
from fedcmt.params import Params
from fedcmt.site import Site
from fedcmt.site_process import SiteProcess
from fedcmt.workspace import MALLOC_VARIABLE
from tests.tiny import DATASET_ID, first_payload

CONFIG = SiteConfig(DATASET_ID, "MR", local_steps=2, val_batches=1, optimizer=OptimizerConfig("AdamW", lr=1e-2))
ALGORITHM = {"path": "fedcmt.algorithms.fedcmt.FedCMT", "args": {}}
ENDLESS = SiteConfig(DATASET_ID, "MR", local_steps=10**6, val_batches=1, optimizer=OptimizerConfig("AdamW", lr=1e-2))


@pytest.fixture
def folders(tiny_folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDCMT_THREADS", "1")
    return tiny_folders


@pytest.fixture
def child(folders: Path) -> Iterator[SiteProcess]:
    site = SiteProcess("north", CONFIG, ALGORITHM, folders / "child")
    yield site
    site.close()


def prepared(site: Site | SiteProcess) -> Params:
    """The payload of round 0 for a site that this makes ready."""
    return first_payload(site, FedCMT())


def round_of(payload: Params, index: int) -> Message:
    return Message({"round": index, "frozen": []}, payload)


def when_training(site: SiteProcess, do: object) -> None:
    """Call ``do`` from another thread once the child has had time to be in a step."""
    time.sleep(3)
    assert callable(do)
    do()


def test_a_child_answers_as_the_site_itself_and_survives_its_death(folders: Path, child: SiteProcess) -> None:
    alone = Site("north", CONFIG, FedCMT(), folders / "alone")
    threads = torch.get_num_threads()
    try:
        payload = prepared(alone)
        first, second = (alone.handle(Task.TRAIN, round_of(payload, index)) for index in (0, 1))
    finally:
        torch.set_num_threads(threads)
    assert prepared(child).keys() == payload.keys()
    answer = child.handle(Task.TRAIN, round_of(payload, 0))
    assert isinstance(answer, Message)
    assert answer.meta["metrics"] == first.meta["metrics"]
    assert all(torch.equal(answer.tensors[name], tensor) for name, tensor in first.tensors.items())
    before = child.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    os.waitid(os.P_PID, before, os.WEXITED | os.WNOWAIT)  # its end stays to be found
    again = child.handle(Task.TRAIN, round_of(payload, 1))  # between two tasks; the site's state came from disk
    assert isinstance(again, Message)
    assert child.pid != before
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in second.tensors.items())
    wrong = child.handle(Task.TRAIN, Message({"round": 2, "frozen": []}, {"x": torch.zeros(1)}))
    assert wrong == Failure("ParameterError in task 'train', explained in the site's log")


def test_a_child_that_is_stopped_or_killed_in_a_step_fails_its_task_within_seconds(folders: Path) -> None:
    site = SiteProcess("north", ENDLESS, ALGORITHM, folders / "child")
    try:
        payload = prepared(site)
        pid = site.pid
        assert pid is not None
        threading.Thread(target=when_training, args=(site, lambda: os.kill(pid, signal.SIGKILL))).start()
        answer = site.handle(Task.TRAIN, round_of(payload, 0))
        assert answer == Failure("the site's process ended in task 'train': signal SIGKILL")
        asked = time.monotonic() + 5
        answer = site.handle(Task.TRAIN, round_of(payload, 0), stop=lambda: time.monotonic() > asked)
        assert isinstance(answer, Failure)
        assert "Aborted" in answer.reason or "ended" in answer.reason
    finally:
        site.close()


def test_a_process_that_trains_keeps_its_blocks_of_memory(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MALLOC_VARIABLE, str(2**20))
    site = SiteProcess("north", CONFIG, ALGORITHM, folders / "child")
    try:
        site.handle(Task.FINISH, Message({}))  # fails, as nothing is prepared, but then the child is there
        variables = psutil.Process(site.pid).environ()
    finally:
        site.close()
    assert MALLOC_VARIABLE not in variables
    assert variables["nnUNet_raw"] == os.environ["nnUNet_raw"]


def test_a_child_does_not_outlive_its_parent(folders: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from fedcmt.config import SiteConfig;"
        "from fedcmt.site_process import SiteProcess; from fedcmt.messages import Message, Task;"
        f"site = SiteProcess('north', SiteConfig({DATASET_ID}, 'MR'), {ALGORITHM!r}, Path({str(folders / 'child')!r}));"
        "site.handle(Task.FINISH, Message({}));"  # fails, as nothing is prepared, but then the child is there
        "print(site.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    orphan = psutil.Process(pid)
    parent.kill()
    parent.wait()
    psutil.wait_procs([orphan], timeout=30)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
