"""Conflict-averse aggregation beside plain passes over the same bytes, and beside FedHCA2's way.

``python benchmarks/aggregation.py`` prints, for updates on disk as the server has them (`fedcmt.uploads`):

(a) Gram matrix and combination over NumPy reading the same bytes twice with one sgemm per chunk;
(b) FedHCA2's way (stack flattened copies, one Gram product, SciPy's SLSQP, weighted sum) over ours;
    peak memory of each beyond the mapped files and the result;
(c) the solver's milliseconds and objective beside SLSQP's at a tight tolerance;
(d) FedCMT's server from a round's last upload to the payloads of the next, all inner products included;
(e) the slope of resident memory over rounds of smaller updates, as FedCMT's server goes from state to state.

Files are in the page cache, everything runs in one process, and the ways take turns. On a machine that others use, the
best turns say most.
"""

import argparse
import ctypes
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor

from fedcmt.algorithms.base import Participant, State, Update
from fedcmt.algorithms.conflict_averse import GramMatrix, combine, rescale, solve
from fedcmt.algorithms.fedcmt import FedCMT
from fedcmt.params import Params
from fedcmt.uploads import SpooledUpdates, StoredTensors

Updates = dict[str, StoredTensors]

CHUNK = 2**16
RADIUS = 0.4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--elements", type=int, default=14_000_000, help="float32 numbers per update")
    parser.add_argument("--tensors", type=int, default=48, help="tensors per update")
    parser.add_argument("--turns", type=int, default=5, help="timed turns of each")
    parser.add_argument("--solver-sites", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=50, help="rounds over which memory is fitted, but for 10 first")
    parser.add_argument("--round-elements", type=int, default=1_000_000, help="float32 numbers per update there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # first: memory that others have freed would serve unseen
        small = _stored_updates(Path(folder), options.sites, options.round_elements, options.tensors)
        _fit_memory(small, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        updates = _stored_updates(Path(folder), options.sites, options.elements, options.tensors)
        _compare_passes(updates, options.turns)
        _time_rounds(updates, options.turns)
    _compare_solvers(options.solver_sites)


def _stored_updates(folder: Path, num_sites: int, num_elements: int, num_tensors: int) -> Updates:
    """Random updates of an encoder with a common part, a file per site; sizes differ as those of layers do."""
    sizes = np.linspace(1, 20, num_tensors) ** 2
    sizes = np.maximum(1, sizes / sizes.sum() * num_elements).astype(int)
    sizes[-1] += num_elements - sizes.sum()
    common = [torch.randn(int(n), generator=torch.Generator().manual_seed(n_idx)) for n_idx, n in enumerate(sizes)]
    updates: Updates = {}
    spool = SpooledUpdates(folder)
    for site in range(num_sites):
        generator = torch.Generator().manual_seed(1000 + site)
        own = {
            f"encoder.stages.{1 + k % 5}.t{k:03}": torch.randn(len(c), generator=generator) + 0.3 * c
            for k, c in enumerate(common)
        }
        updates[f"site{site:02}"] = spool.add(f"site{site:02}", own)
    return updates


def _compare_passes(updates: Updates, turns: int) -> None:
    one = next(iter(updates.values()))
    num_elements = sum(tensor.numel() for tensor in one.values())
    result_mib = num_elements * 4 / 2**20
    print(
        f"{len(updates)} updates of {num_elements:,} float32 in {len(one)} tensors, {torch.get_num_threads()} threads"
    )
    ways: dict[str, Callable[[Updates], object]] = {"ours": _ours, "bytes twice": _bytes_twice, "FedHCA2": _fedhca2}
    peaks = {name: _peak_mib(way, updates) - result_mib for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            seconds[name].append(_seconds(way, updates))
    for name, values in seconds.items():
        print(
            f"  {name:12} {min(values):.3f} s at best, {statistics.median(values):.3f} s median of {turns}; "
            f"{peaks[name]:.1f} MiB beyond files and result"
        )
    for part in (_gram, _combination):
        print(f"  ours, {part.__name__[1:]} alone: {min(_seconds(part, updates) for _ in range(turns)):.3f} s at best")
    for name in ("bytes twice", "FedHCA2"):
        each = [ours / theirs for ours, theirs in zip(seconds["ours"], seconds[name], strict=True)]
        print(
            f"  ours / {name:12} {min(seconds['ours']) / min(seconds[name]):.3f} at best, "
            f"{statistics.median(each):.3f} median of turns"
        )


def _ours(updates: Updates) -> Params:
    solution = solve(_gram(updates), np.full(len(updates), 1 / len(updates)), RADIUS)
    return combine(updates, rescale(solution.coefficients, RADIUS, 2))


def _gram(updates: Updates) -> np.ndarray:
    gram = GramMatrix()
    for site, update in updates.items():
        gram.add(site, update)
    return gram.matrix()


def _combination(updates: Updates) -> Params:
    return combine(updates, np.linspace(0.1, 0.2, len(updates)))


def _bytes_twice(updates: Updates) -> list[np.ndarray]:
    """Two passes, each with one sgemm per chunk: rows by rows, then coefficients by rows."""
    rows = [[tensor.numpy() for tensor in update.values()] for update in updates.values()]
    buffer = np.empty((len(rows), CHUNK), dtype=np.float32)
    gram = np.zeros((len(rows), len(rows)))
    for chunk, _ in _packed(rows, buffer):
        gram += chunk @ chunk.T
    coefficients = np.linspace(0.1, 0.2, len(rows), dtype=np.float32)[None]
    out = [np.empty(tensor.shape, dtype=np.float32) for tensor in rows[0]]
    for chunk, (tensor, part) in _packed(rows, buffer):
        out[tensor][part] = (coefficients @ chunk)[0]
    return out


def _packed(rows: list[list[np.ndarray]], buffer: np.ndarray) -> Iterator[tuple[np.ndarray, tuple[int, slice]]]:
    """Each chunk [N, c] of the updates, copied into the buffer, with its tensor and place."""
    for tensor in range(len(rows[0])):
        for start in range(0, rows[0][tensor].size, CHUNK):
            part = slice(start, min(start + CHUNK, rows[0][tensor].size))
            chunk = buffer[:, : part.stop - part.start]
            for row, own in zip(chunk, rows, strict=True):
                row[:] = own[tensor][part]
            yield chunk, (tensor, part)


def _fedhca2(updates: Updates) -> Tensor:
    """FedHCA2's conflict-averse step on one device: N flattened copies side by side, and everything from them."""
    stacked = torch.stack([torch.cat([t.flatten() for t in update.values()]) for update in updates.values()], dim=1)
    gram = stacked.t().mm(stacked).double().numpy()
    share = np.full(len(updates), 1 / len(updates))
    weights = torch.from_numpy(_slsqp(gram, share, RADIUS, {}).x).float()
    mean = stacked.mean(1)
    chosen = (stacked * weights.view(1, -1)).sum(1)
    return (mean + RADIUS * mean.norm() / chosen.norm() * chosen) / (1 + RADIUS**2)


def _slsqp(gram: np.ndarray, share: np.ndarray, radius: float, options: dict) -> OptimizeResult:
    k = radius * np.sqrt(share @ gram @ share)
    return minimize(
        lambda w: w @ gram @ share + k * np.sqrt(w @ gram @ w),
        share,
        jac=lambda w: gram @ share + k * gram @ w / np.sqrt(w @ gram @ w),
        bounds=[(0, 1)] * len(share),
        constraints={"type": "eq", "fun": lambda w: 1 - w.sum(), "jac": lambda w: -np.ones(len(share))},
        method="SLSQP",
        options=options,
    )


def _compare_solvers(num_sites: int, instances: int = 20) -> None:
    ours_ms, theirs_ms, iterations, differences = [], [], [], []
    for seed in range(instances):
        random = np.random.default_rng(seed)
        rows = random.standard_normal((num_sites, 200)) * random.lognormal(0, 0.5, (num_sites, 1))
        gram = rows @ rows.T
        gram /= np.diagonal(gram).mean()
        share = random.dirichlet(np.ones(num_sites))
        started = time.perf_counter()
        solution = solve(gram, share, RADIUS)
        ours_ms.append(1e3 * (time.perf_counter() - started))
        started = time.perf_counter()
        found = _slsqp(gram, share, RADIUS, {"ftol": 1e-15, "maxiter": 1000})
        theirs_ms.append(1e3 * (time.perf_counter() - started))
        w = solution.weights
        objective = w @ gram @ share + RADIUS * np.sqrt(share @ gram @ share) * np.sqrt(w @ gram @ w)
        differences.append((objective - found.fun) / abs(found.fun))
        iterations.append(solution.iterations)
    print(f"solver, {num_sites} sites, {instances} instances")
    print(f"  ours  {statistics.median(ours_ms):.1f} ms ({max(ours_ms):.1f} at most), {max(iterations)} steps at most")
    print(f"  SLSQP {statistics.median(theirs_ms):.1f} ms ({max(theirs_ms):.1f} at most)")
    print(f"  objective, ours - SLSQP, relative: {min(differences):.1e} to {max(differences):.1e}")


def _time_rounds(updates: Updates, turns: int) -> None:
    """The server's part of a round; the first is not counted, as it has no momentum."""
    algorithm, state, participants = _federation(updates, turns + 1)
    aggregate_s, payload_s = [], []
    for _ in range(turns + 1):
        started = time.perf_counter()
        state = algorithm.aggregate(state, _uploads(updates))
        aggregated = time.perf_counter()
        for participant in participants:
            algorithm.payload(state, participant)
        aggregate_s.append(aggregated - started)
        payload_s.append(time.perf_counter() - aggregated)
    print(f"FedCMT's server, {len(updates)} updates as above, {turns} rounds after the first")
    print(
        f"  aggregate {min(aggregate_s[1:]):.3f} s at best, {statistics.median(aggregate_s[1:]):.3f} s median; "
        f"payloads {1e3 * statistics.median(payload_s[1:]):.2f} ms"
    )


def _fit_memory(updates: Updates, num_rounds: int, first: int = 10) -> None:
    """The slope of resident memory over the rounds after the first ones, by least squares."""
    algorithm, state, participants = _federation(updates, num_rounds)
    resident = []
    for _ in range(num_rounds):
        state = algorithm.aggregate(state, _uploads(updates))
        for participant in participants:
            algorithm.payload(state, participant)
        resident.append(_status_mib("VmRSS"))
    late = resident[first:]
    slope = np.polyfit(np.arange(len(late)), late, 1)[0]
    num_elements = sum(tensor.numel() for tensor in next(iter(updates.values())).values())
    print(f"FedCMT's server, {len(updates)} updates of {num_elements:,}, {num_rounds} rounds")
    print(
        f"  resident memory after the first {first}: {slope:+.3f} MiB a round, "
        f"from {late[0]:.1f} to {late[-1]:.1f} MiB, {late[-1] / late[0]:.4f} times"
    )


def _federation(updates: Updates, num_rounds: int) -> tuple[FedCMT, State, list[Participant]]:
    """FedCMT before its first round, with one tensor of the encoder for each of an update's."""
    algorithm = FedCMT()
    initial = {name: torch.zeros_like(tensor) for name, tensor in next(iter(updates.values())).items()}
    wire_shapes = {name: tuple(tensor.shape) for name, tensor in initial.items()}
    participants = [Participant(site, "MR", ("T1",), 10 + k, wire_shapes) for k, site in enumerate(updates)]
    return algorithm, algorithm.init(initial, participants, num_rounds), participants


def _uploads(updates: Updates) -> dict[str, Update]:
    return {site: Update(update, 10 + k, 250) for k, (site, update) in enumerate(updates.items())}


def _seconds(way: Callable[[Updates], object], updates: Updates) -> float:
    started = time.perf_counter()
    way(updates)
    return time.perf_counter() - started


def _peak_mib(way: Callable[[Updates], object], updates: Updates) -> float:
    """Peak growth of anonymous memory: mapped pages of the updates' files are not counted."""
    ctypes.CDLL(None).malloc_trim(0)  # memory freed before would serve unseen
    before = _status_mib("RssAnon")
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _status_mib("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = way(updates)
    done.set()
    watcher.join()
    peak = max(peak, _status_mib("RssAnon"))
    del result
    return peak - before


def _status_mib(field: str) -> float:
    """A field of Linux's /proc/self/status, e.g. RssAnon (Linux 4.5) or VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this needs Linux 4.5 or later")


if __name__ == "__main__":
    main()
