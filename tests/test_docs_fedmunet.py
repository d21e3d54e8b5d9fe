"""The command lines of docs/fedmunet.md are those of jobs that can start."""

import re
import shlex
from pathlib import Path

import pytest

from fedcmt.config import JobConfig
from fedcmt.job_folder import find_job, parse_override
from fedcmt.launch import Run, checked

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "fedmunet.md").read_text(), re.DOTALL)
STARTS = [
    shlex.split(line, comments=True)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if "start_fl.sh" in line
]


def job_of(words: list[str], folder: Path) -> JobConfig:
    """The job that a line starts, with its settings."""
    name, *options = words[words.index("start_fl.sh") + 1 :]
    assert options[::2] == ["--set"] * (len(options) // 2)
    return checked(Run(find_job(ROOT / "jobs", name), folder, "inprocess", [*map(parse_override, options[1::2])], None))


@pytest.mark.parametrize("words", STARTS, ids=lambda words: " ".join(words)[:60])
def test_every_documented_line_is_a_job_that_can_start(words: list[str], tmp_path: Path) -> None:
    assert job_of(words, tmp_path).server.planning["network"] == "MUNet"


def test_the_line_for_parity_trains_as_published(tmp_path: Path) -> None:
    job = job_of(next(words for words in STARTS if "sites.loss=fedmunet" in words), tmp_path)
    assert (job.server.num_rounds, job.server.privacy.mode) == (50, "compat_noise")
    planning = {
        "configuration": "2d",
        "base_features": 16,
        "max_stages": 5,
        "batch_size": 32,
        "normalization": "minmax",
    }
    assert planning.items() <= job.server.planning.items()
    for site in job.sites.values():
        assert (site.loss, site.local_steps, site.mirror_axes, site.grad_clip) == ("fedmunet", 750, [], 1e9)
        optimizer = site.optimizer
        assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("SGD", 0.01, 0.95, 3e-5)
        assert (optimizer.schedule, optimizer.reset) == ("exp_poly", True)
