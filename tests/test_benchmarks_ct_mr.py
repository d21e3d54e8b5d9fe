"""What the benchmark on CT and MR keeps of its runs."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ct_mr


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Options of a comparison whose runs succeed at once."""

    def done(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--workspace") + 1])
        (folder / "results.json").write_text(json.dumps({"rounds": command[command.index("--rounds") + 1]}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(ct_mr.subprocess, "run", done)
    return argparse.Namespace(workspace=tmp_path, rounds=40, local_steps=5, threads=1, set=[])


def test_a_run_is_used_again_for_the_same_settings_and_refused_for_others(asked: argparse.Namespace) -> None:
    ct_mr._run("fedcmt", 0, asked)
    results = asked.workspace / "fedcmt_0" / "results.json"
    written = results.stat().st_mtime_ns
    ct_mr._run("fedcmt", 0, asked)
    assert results.stat().st_mtime_ns == written
    for other in ({"rounds": 10}, {"local_steps": 20}, {"set": ["sites.optimizer.lr=0.003"]}):
        with pytest.raises(SystemExit, match="results of other settings; give --workspace another folder"):
            ct_mr._run("fedcmt", 0, argparse.Namespace(**{**vars(asked), **other}))
