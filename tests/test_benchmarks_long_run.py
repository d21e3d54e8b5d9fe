"""The benchmark of a long run: what it makes of samples, and of processes that stay."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import psutil
import pytest
from long_run import COHORT, ROOT, SETTINGS, Course, Sample, _left, missed, role, summarise, table

from fedcmt.config import JobConfig
from fedcmt.job_folder import apply_overrides, find_job, stage


def samples(resident_mb: Sequence[float], open_files: Sequence[int]) -> list[Sample]:
    pairs = zip(resident_mb, open_files, strict=True)
    return [Sample(number, mb, files) for number, (mb, files) in enumerate(pairs, start=1)]


def test_growth_is_the_slope_after_the_first_rounds() -> None:
    resident = [10.0, 400.0, 500.0] + [600 + 0.25 * k for k in range(10)]
    course = summarise("server", samples(resident, [9] * 13), first=3)
    assert course.mb_a_round == pytest.approx(0.25)
    assert (course.first.rounds, course.last.rounds) == (4, 13)
    assert (course.first.resident_mb, course.last.resident_mb) == (600, 602.25)


def test_a_file_that_stays_open_each_round_is_seen() -> None:
    # Quarters of eight rounds: 10 and 11 files at first, 16 and 17 at last.
    course = summarise("server", samples([100.0] * 8, range(10, 18)), first=0)
    assert course.files_gained == 6


def test_a_file_that_is_open_for_a_moment_is_no_growth() -> None:
    course = summarise("server", samples([100.0] * 12, [10, 10, 10, 11, 10, 10, 12, 10, 10, 10, 11, 11]), first=0)
    assert course.files_gained == 0
    assert missed({"server": course}, 0) == []


@dataclass
class Stub:
    """What `role` asks of a process."""

    words: str
    above: "Stub | None" = None
    below: list[str] = field(default_factory=list)

    def cmdline(self) -> list[str]:
        return self.words.split()

    def parent(self) -> "Stub | None":
        return self.above

    def children(self) -> list[str]:
        return self.below

    def name(self) -> str:
        return "other"


def test_every_process_of_a_job_has_a_name() -> None:
    launcher = Stub("python -m fedcmt.compare_runs --engine simulator", below=["simulator"])
    simulator = Stub("python -u -m fedcmt.flare.simulator_process job -w flare", launcher, ["server", "manager"])
    manager, server = (Stub(simulator.words, simulator, below) for below in ([], ["worker"]))
    flare = "nvflare.private.fed.app.simulator.simulator_worker"
    worker = Stub(f"python -m {flare} -o flare --client client2 --token 7", server, ["training"])
    training = Stub("python -m fedcmt.site_process 8 11", worker)
    alone = Stub("python -m fedcmt.compare_runs --engine inprocess")
    found = [role(one) for one in (launcher, simulator, manager, server, worker, training, alone, Stub("sleep"))]
    assert found == [
        "launcher",
        "simulator",
        "simulator's manager",
        "server",
        "site client2, FLARE",
        "site client2, training",
        "server and sites",
        "other",
    ]


def test_too_few_rounds_to_tell_are_refused() -> None:
    with pytest.raises(ValueError, match="server: was there at the end of 7 rounds after round 5"):
        summarise("server", samples([100.0] * 12, [10] * 12), first=5)


def test_each_target_that_is_missed_is_named() -> None:
    start, end = Sample(21, 100.0, 10), Sample(200, 140.0, 13)
    courses = {"server": Course(start, end, 0.2, 3), "site client1": Course(start, end, -0.3, 0)}
    assert missed(courses, 2) == [
        "server grows by 0.200 MB a round, below 0.1 is asked for",
        "server has 3 more files open",
        "2 processes are left",
    ]
    assert "| server | 21 to 200 | 100.0 to 140.0 | +0.2000 | 10 to 13 | +3 |" in table(courses)


def test_a_process_that_outlives_its_job_is_left_and_one_that_ended_is_not(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        seen = [psutil.Process(process.pid)]
        assert _left(seen, tmp_path) == seen
    assert _left(seen, tmp_path) == []


def test_the_settings_fit_the_job(tmp_path: Path) -> None:
    stage(find_job(ROOT / "jobs", "brats_sdl"), tmp_path / "job")
    apply_overrides(tmp_path / "job", {**SETTINGS, "server.num_rounds": 9}.items())
    job = JobConfig.from_folder(tmp_path / "job")
    assert job.server.num_rounds == 9
    assert {f"Dataset{site.dataset_id}" for site in job.sites.values()} == {name[:10] for name in COHORT}
