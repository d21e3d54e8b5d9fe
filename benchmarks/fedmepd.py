"""FedMEPD's server at the published size: what travels, and how long its two turns of a round take.

``python benchmarks/fedmepd.py`` prints, for eight sites with one to four sequences and a fusion site with all four:

(a) bytes that go to and come from each kind of site, in safetensors form, beside 4 bytes for each number that FedMEPD
    exchanges (1,466,496 of an encoder, 2,532,588 of the decoder, 3,840 of the anchors);
(b) seconds in which the server takes in the sites' updates, and the fusion site's (patience and weights included),
    beside two bare copies of all that the turn reads, updates and state.

Updates are random and in memory; there are no images. The ways take turns, and medians are over rounds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import Tensor

from fedcmt.algorithms.base import Participant, State, Update
from fedcmt.algorithms.fedmepd import FUSION, FedMEPD
from fedcmt.models.fedmepd import FedMEPDNet
from fedcmt.models.sequences import SEQUENCES
from fedcmt.params import Params, serialized_size

HELD = {f"c{2 * count - 2 + copy}": SEQUENCES[:count] for count in (1, 2, 3, 4) for copy in (1, 2)}
CASES = 20
CLASSES = 4
ENCODER, DECODER, ANCHORS = 1_466_496, 2_532_588, 3_840
WIDTHS = (16, 32, 64, 128)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    options = parser.parse_args()
    algorithm = FedMEPD(pretrain_rounds=0)
    sites = [_participant(name, held) for name, held in HELD.items()]
    fusion = _participant(FUSION, SEQUENCES, FUSION)
    initial = {name: torch.randn(shape) * 0.05 for name, shape in fusion.wire_shapes.items()}
    state = algorithm.init(initial, [*sites, fusion], options.rounds + 1)
    state = algorithm.aggregate(state, _updates(algorithm, state, [fusion]))
    _print_bytes(algorithm, state, [*sites[::2], fusion])
    _print_seconds(algorithm, state, sites, fusion, options.rounds)


def _participant(name: str, sequences: Sequence[str], role: str = "site") -> Participant:
    with torch.device("meta"):
        network = FedMEPDNet(len(sequences), CLASSES, list(sequences), features_per_stage=WIDTHS)
    travels = {n: tuple(p.shape) for n, p in network.named_parameters() if n.startswith(("encoders.", "decoder."))}
    return Participant(name, "MR", tuple(sequences), CASES, travels, role)


def _updates(algorithm: FedMEPD, state: State, sites: Sequence[Participant]) -> dict[str, Update]:
    """Random changes of what each site receives, with the fusion site's anchors."""
    updates = {}
    for site in sites:
        delta = {n: 1e-3 * torch.randn(t.shape) for n, t in algorithm.payload(state, site).tensors.items()}
        updates[site.name] = Update(delta, CASES, 1, extras=_anchors() if site.role == FUSION else {})
    return updates


def _anchors() -> Params:
    return {f"anchors.{level}": torch.randn(4 * CLASSES, width) for level, width in enumerate(WIDTHS, start=1)}


def _print_bytes(algorithm: FedMEPD, state: State, sites: Sequence[Participant]) -> None:
    """A row for each kind of site, in millions of bytes."""
    print("| site | down, MB | numbers down, MB | up, MB | numbers up, MB |\n|:--|--:|--:|--:|--:|")
    for site in sites:
        payload, update = algorithm.payload(state, site), _updates(algorithm, state, [site])[site.name]
        numbers = len(site.channels) * ENCODER + DECODER
        down, up = (numbers + ANCHORS, numbers) if site.role != FUSION else (numbers, numbers + ANCHORS)
        row = (_bytes(payload.tensors, payload.extras), 4 * down, _bytes(update.delta, update.extras), 4 * up)
        kind = FUSION if site.role == FUSION else f"{len(site.channels)} of 4 sequences"
        print(f"| {kind} | {' | '.join(f'{value / 1e6:.3f}' for value in row)} |")


def _bytes(*parts: Params) -> int:
    return sum(serialized_size(tensors)[1] for tensors in parts if tensors)


def _print_seconds(
    algorithm: FedMEPD, state: State, sites: Sequence[Participant], fusion: Participant, rounds: int
) -> None:
    """A row for each turn: its seconds, those of two copies of what it reads, and how often these fit in."""
    seconds: dict[str, list[tuple[int, float, float]]] = {"the sites' turn": [], "the fusion site's turn": []}
    for _ in range(rounds):
        for turn, asked in zip(seconds, (sites, [fusion]), strict=True):
            updates = _updates(algorithm, state, asked)
            read = [*_tensors(updates), *state.params.values(), *state.memory.values()]
            bare = _seconds_of_two_copies(read)
            started = time.perf_counter()
            state = algorithm.aggregate(state, updates)
            seconds[turn].append((sum(t.nbytes for t in read), time.perf_counter() - started, bare))
    print(f"\n{torch.get_num_threads()} threads, medians of {rounds}")
    print("| turn | reads, MB | server, s | two copies, s | server / copies |\n|:--|--:|--:|--:|--:|")
    for turn, rows in seconds.items():
        ours, bare = (statistics.median(row[i] for row in rows) for i in (1, 2))
        ratio = statistics.median(row[1] / row[2] for row in rows)
        print(f"| {turn} | {rows[-1][0] / 1e6:.1f} | {ours:.3f} | {bare:.3f} | {ratio:.2f} |")


def _tensors(updates: Mapping[str, Update]) -> list[Tensor]:
    return [t for update in updates.values() for part in (update.delta, update.extras) for t in part.values()]


def _seconds_of_two_copies(tensors: Sequence[Tensor]) -> float:
    """All is read and as much written, twice, into memory that is there already."""
    targets = [torch.zeros_like(tensor) for tensor in tensors]
    started = time.perf_counter()
    for _ in range(2):
        for target, tensor in zip(targets, tensors, strict=True):
            target.copy_(tensor)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
