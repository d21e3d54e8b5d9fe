"""Uploads on disk: the same tensors, mapped while they are read, and gone when the round is over."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedcmt.algorithms.conflict_averse import GramMatrix, combine
from fedcmt.params import ParameterError
from fedcmt.uploads import SpooledUpdates

SOURCE = Path(__file__).resolve().parents[1] / "src"

AGGREGATE_16_SITES = """
import sys
from pathlib import Path
import torch
from fedcmt.algorithms.conflict_averse import GramMatrix, combine
from fedcmt.uploads import SpooledUpdates

def resident_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1e3

def upload(generator):
    return {f"w{k}": torch.randn(50_000, 2, generator=generator) for k in range(20)}  # 8 MB

folder, spools = Path(sys.argv[1]), sys.argv[2] == "spooled"
generator, gram, updates = torch.Generator().manual_seed(0), GramMatrix(), {}
with SpooledUpdates(folder) as spool:
    for site in ("warm-up", *map(str, range(16))):
        update = upload(generator)
        update = spool.add(site, update) if spools else update
        gram.add(site, update)
        updates[site] = update
        if site == "warm-up":
            gram.matrix()
            result = combine(updates, [1.0])
            before = peak = resident_mb()
        peak = max(peak, resident_mb())
    gram.matrix()
    peak = max(peak, resident_mb())
    result = combine(updates, [1.0] * 17)
    print(max(peak, resident_mb()) - before)
"""


def upload() -> dict[str, Tensor]:
    """Several types, a scalar, an empty tensor, a strided one, and one memory under two names."""
    shared = torch.arange(4.0)
    return {
        "conv": torch.arange(30.0).reshape(5, 2, 3),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "double": torch.tensor([[1e-300]], dtype=torch.float64),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(6.0).reshape(2, 3).T,
        "one": shared,
        "other": shared,
    }


def growth_mb(folder: Path, way: str) -> float:
    """How far resident memory grows over the uploads of 16 sites, in a process of its own."""
    command = [sys.executable, "-c", AGGREGATE_16_SITES, str(folder), way]
    # glibc otherwise keeps freed tensors of up to 32 MB in its heap, where 64-byte alignment lets few be used again.
    environment = {"PYTHONPATH": str(SOURCE), "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_an_upload_comes_back_as_it_was(tmp_path: Path) -> None:
    plain = upload()
    with SpooledUpdates(tmp_path / "new" / "folder") as spool:
        mapped = spool.add("a", plain)
        assert mapped.keys() == plain.keys()
        assert all(torch.equal(mapped[name], plain[name]) for name in plain)
        assert all(mapped[name].dtype == plain[name].dtype for name in plain)


def test_uploads_do_not_mix(tmp_path: Path) -> None:
    with SpooledUpdates(tmp_path) as spool:
        # Names that differ in what file names cannot tell apart.
        mapped = {
            site: spool.add(site, {"w": torch.tensor([float(k)])}) for k, site in enumerate(("a/b", "a_b", "A_b"))
        }
        assert [update["w"].item() for update in mapped.values()] == [0, 1, 2]


def test_writing_to_a_tensor_changes_nothing_else(tmp_path: Path) -> None:
    with SpooledUpdates(tmp_path) as spool:
        mapped = spool.add("a", {"w": torch.tensor([1.0])})
        first = mapped["w"]
        first += 10
        assert (first.item(), mapped["w"].item()) == (11, 1)


def test_files_go_when_the_round_closes_and_a_tensor_in_use_stays_readable(tmp_path: Path) -> None:
    with SpooledUpdates(tmp_path) as spool:
        mapped = spool.add("a", upload())
        assert len(list(tmp_path.iterdir())) == 1
        conv = mapped["conv"]
    assert not list(tmp_path.iterdir())
    assert torch.equal(conv, upload()["conv"])
    with pytest.raises(RuntimeError, match="No such file"):
        mapped["conv"]


def test_an_upload_without_tensors_is_kept_too(tmp_path: Path) -> None:
    with SpooledUpdates(tmp_path) as spool:
        assert dict(spool.add("a", {})) == {}
        assert spool.add("b", {"none": torch.zeros(0, 3)})["none"].shape == (0, 3)


def test_files_go_when_the_round_fails(tmp_path: Path) -> None:
    def failing_round() -> None:
        with SpooledUpdates(tmp_path) as spool:
            spool.add("a", upload())
            raise RuntimeError("site lost")

    with pytest.raises(RuntimeError, match="site lost"):
        failing_round()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    SpooledUpdates(tmp_path).add("a", upload())
    (tmp_path / "state.safetensors").write_bytes(b"kept")
    SpooledUpdates(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_site_uploads_once_a_round(tmp_path: Path) -> None:
    with SpooledUpdates(tmp_path) as spool:
        spool.add("a", upload())
        with pytest.raises(ParameterError, match=r"upload of 'a': is already in .*one upload a site and round"):
            spool.add("a", upload())


def test_mapped_updates_aggregate_to_the_same_bits(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    plain = {site: {n: torch.randn(70_001, generator=generator) for n in ("v", "w")} for site in ("b", "a")}
    in_memory, on_disk = GramMatrix(), GramMatrix()
    with SpooledUpdates(tmp_path) as spool:
        mapped = {site: spool.add(site, update) for site, update in plain.items()}
        for site in plain:
            in_memory.add(site, plain[site])
            on_disk.add(site, mapped[site])
        assert (in_memory.matrix() == on_disk.matrix()).all()
        combined, expected = combine(mapped, [0.5, -2]), combine(plain, [0.5, -2])
    assert all(torch.equal(combined[name], expected[name]) for name in expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_sites(tmp_path: Path) -> None:
    # The 16 uploads are 128 MB; one in transit, its written form and one tensor of each (6.4 MB) are held at a time.
    assert growth_mb(tmp_path, "spooled") < 30
    assert growth_mb(tmp_path, "held") > 120
