"""The benchmark of many sites: its sites, its peer and its measure of memory."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import numpy as np
import pytest
import torch
from many_sites import FakeSites, make_model, peaks, run_rounds

from fedcmt.messages import Message, Task
from fedcmt.params import Params, load_tensors


def updates(sites: FakeSites, model: Params, round_idx: int) -> dict[str, Params]:
    requests = {site: Message({"round": round_idx}, model) for site in sites.names}
    answers = sites.exchange(Task.TRAIN, requests)
    return {site: answer.tensors for site, answer in answers.items() if isinstance(answer, Message)}


def test_a_model_has_the_numbers_asked_for_in_tensors_of_many_sizes() -> None:
    model = make_model(1003, 7)
    assert len(model) == 7
    assert sum(tensor.numel() for tensor in model.values()) == 1003
    assert len({tensor.numel() for tensor in model.values()}) > 3


def test_updates_differ_by_site_and_round_and_point_the_same_way() -> None:
    model = make_model(5000, 3)
    sites = FakeSites(["a", "b"], model)
    first, second = (
        {site: torch.cat(list(update.values())) for site, update in updates(sites, model, round_idx).items()}
        for round_idx in (0, 1)
    )
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], second["a"])
    # 0.3 of the common part in each of 1 + 0.3² squared lengths: 0.09 / 1.09, but for what chance adds.
    cosine = float(torch.cosine_similarity(first["a"], first["b"], dim=0))
    assert cosine == pytest.approx(0.09 / 1.09, abs=0.05)


@pytest.mark.parametrize("algorithm", ["FedAvg", "FedCMT"])
def test_uploads_in_memory_give_the_same_model_as_on_disk(algorithm: str, tmp_path: Path) -> None:
    model = make_model(1000, 4)
    for way in ("on disk", "in memory"):
        assert len(run_rounds(algorithm, way, model, 3, 2, tmp_path / way)) == 2
    on_disk, in_memory = (load_tensors(tmp_path / way / "state.safetensors")[0] for way in ("on disk", "in memory"))
    assert all(torch.equal(in_memory[name], tensor) for name, tensor in on_disk.items())
    assert not torch.equal(on_disk["params/encoder.stages.1.t000"], model["encoder.stages.1.t000"])
    assert (tmp_path / "on disk" / "uploads").is_dir()
    assert not (tmp_path / "in memory" / "uploads").exists()


def test_the_peak_of_a_block_has_what_it_takes() -> None:
    with peaks() as found:
        held = np.ones(10_000_000)  # 80 MB
    assert held.sum() == 10_000_000
    assert 0.07 < found["RssAnon"] < 0.3
    assert 0.07 < found["VmRSS"] < 0.3
