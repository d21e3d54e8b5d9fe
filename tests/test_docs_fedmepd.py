"""The command lines of docs/fedmepd.md are those of jobs that can start; its settings change what they name alone."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from fedcmt.config import JobConfig, SiteConfig
from fedcmt.job_folder import Override, demo_profile, find_job, parse_override
from fedcmt.launch import Run, checked

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "fedmepd.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
STARTS = [line for block in BLOCKS for line in block.splitlines() if "start_fl.sh" in line]
ROWS = re.findall(r"^\| ([^|]+) \| (`'?algorithm\.[^|]+) \|$", TEXT, re.MULTILINE)
SETTINGS = [one for one in re.findall(r"`([^`\n]+)`", TEXT) if re.match(r"'?(server|sites|algorithm)\.[\w.]+=", one)]
ABLATIONS = {name: [parse_override(*shlex.split(one)) for one in re.findall(r"`([^`]+)`", row)] for name, row in ROWS}
DIFFERENCES = TEXT.partition("## What differs from the publication")[2].partition("\n## ")[0]


def job_of(name: str, demo: bool, *overrides: Override) -> JobConfig:
    """A job, with its demo profile or without, as it would start with these settings."""
    folder = find_job(ROOT / "jobs", name)
    profile = demo_profile(folder) if demo else None
    given = [*(profile["set"].items() if profile else []), *overrides]
    return checked(Run(folder, ROOT / "workspace" / name, "inprocess", given, None))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value that is no object, by the dotted path to it."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def settings_of(job: JobConfig) -> dict[str, Any]:
    """All that a job says, by the dotted paths that ``--set`` takes."""
    sites = {name: asdict(site) for name, site in job.sites.items()}
    return flat({"server": asdict(job.server), "algorithm": job.algorithm["args"], **sites})


def test_the_table_of_ablations_is_read() -> None:
    assert set(ABLATIONS) == {"P", "K", "no anchors", "decoder fully shared", "decoder fully personal"}
    assert ABLATIONS["P"] == [("algorithm.patience", 6)]


@pytest.mark.parametrize(("job", "demo"), [("brats_fedmepd", False), ("brats_fedmepd", True), ("ms_fedmepd", False)])
@pytest.mark.parametrize("row", ABLATIONS)
def test_an_ablation_changes_what_it_names_and_nothing_else(row: str, job: str, demo: bool) -> None:
    before, after = settings_of(job_of(job, demo)), settings_of(job_of(job, demo, *ABLATIONS[row]))
    named = flat(dict(ABLATIONS[row]))
    assert after == {**before, **named}
    assert after != before


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_documented_setting_never_replaces_a_whole_object(setting: str) -> None:
    assert not isinstance(parse_override(*shlex.split(setting))[1], dict)


@pytest.mark.parametrize("line", STARTS)
def test_every_documented_line_is_a_job_that_can_start(line: str) -> None:
    words = shlex.split(line, comments=True)
    (name,) = words[words.index("start_fl.sh") + 1 :]
    assert job_of(name, demo=False).server.planning["network"] == "FedMEPDNet"


def test_calibration_that_adds_keeps_the_other_options_of_the_network() -> None:
    (line,) = {one for one in SETTINGS if "calibration=add" in one}
    reflect = ("server.planning.network_options.padding_mode", "reflect")
    job = job_of("brats_fedmepd", False, reflect, parse_override(line))
    assert job.server.planning["network_options"] == {"padding_mode": "reflect", "calibration": "add"}


def test_values_of_the_differences_are_the_jobs_own() -> None:
    job = job_of("brats_fedmepd", demo=False)
    (clip,) = {site.grad_clip for site in job.sites.values()}
    assert f"2-norm of {clip:g}" in DIFFERENCES
    assert {site.mirroring for site in job.sites.values()} == {False}
    assert {site.fold for site in job.sites.values()} == {0}
    assert job.server.planning["batch_size"] == 1
    assert job.server.num_rounds == 1001
    assert f"R = {job.server.num_rounds}" in DIFFERENCES


def test_t24_windows_start_where_the_differences_say() -> None:
    (starts,) = re.findall(r"half a patch apart \(([\d, ]+)\)", DIFFERENCES)
    assert compute_steps_for_sliding_window((128,), (80,), 0.5) == [[int(start) for start in starts.split(", ")]]


def test_the_last_round_trains_at_the_rate_that_the_differences_say() -> None:
    job = job_of("brats_fedmepd", demo=False)
    (rate,) = {site.optimizer.lr * (1 / job.server.num_rounds) ** 0.9 for site in job.sites.values()}
    assert f"trains with {round(rate, 8):.0e}".replace("e-07", "e-7") in DIFFERENCES


def test_options_that_the_differences_call_absent_are_absent() -> None:
    absent = re.findall(r"`(parity|prototype_pass|aug)`", DIFFERENCES)
    assert set(absent) == {"parity", "prototype_pass", "aug"}
    known = {*SiteConfig.__dataclass_fields__, *settings_of(job_of("brats_fedmepd", demo=False))}
    assert not known & set(absent)
    for key in ("parity", "prototype_pass"):
        with pytest.raises(ValueError, match=key):
            job_of("brats_fedmepd", False, (f"algorithm.{key}", True))
