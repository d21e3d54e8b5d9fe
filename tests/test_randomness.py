"""Random streams: each owner draws as if it were alone, and goes on where it was stored."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcmt.params import load_tensors, save_tensors
from fedcmt.randomness import RandomStream, derive_seed


def draw() -> tuple[float, ...]:
    """One number of each global generator; normal ones, since those are drawn in pairs and one is kept."""
    return random.gauss(0, 1), float(np.random.normal()), float(torch.randn(1))  # noqa: NPY002


def draws(stream: RandomStream, count: int) -> list[tuple[float, ...]]:
    with stream.active():
        return [draw() for _ in range(count)]


def test_streams_of_one_seed_agree_and_of_two_do_not() -> None:
    assert draws(RandomStream(3), 2) == draws(RandomStream(3), 2)
    assert all(a != b for a, b in zip(draws(RandomStream(3), 1)[0], draws(RandomStream(4), 1)[0], strict=True))


def test_streams_that_take_turns_do_not_disturb_each_other() -> None:
    alone = draws(RandomStream(1), 4)
    first, second = RandomStream(1), RandomStream(2)
    turns = []
    for _ in range(4):
        turns += draws(first, 1)
        draws(second, 3)
        draw()
    assert turns == alone


def test_the_caller_s_generators_stay_where_they_were() -> None:
    random.seed(9)
    np.random.seed(9)  # noqa: NPY002
    torch.manual_seed(9)
    wanted = [draw(), draw()]
    random.seed(9)
    np.random.seed(9)  # noqa: NPY002
    torch.manual_seed(9)
    got = [draw()]
    draws(RandomStream(1), 3)
    got.append(draw())
    assert got == wanted


def test_an_error_inside_restores_the_caller_and_keeps_the_position() -> None:
    wanted = draws(RandomStream(5), 2)[1]
    torch.manual_seed(9)
    caller = torch.get_rng_state()
    stream = RandomStream(5)
    with pytest.raises(ZeroDivisionError), stream.active():
        _ = [draw(), 1 / 0]
    assert torch.equal(torch.get_rng_state(), caller)
    assert draws(stream, 1)[0] == wanted


def test_a_stored_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    stream = RandomStream(7)
    draws(stream, 3)  # an odd number of normal numbers: the generators keep one back
    tensors, plain = stream.export()
    save_tensors(tmp_path / "random", tensors, plain)
    wanted = draws(stream, 4)
    other = RandomStream(8)
    other.load(*load_tensors(tmp_path / "random"))
    assert draws(other, 4) == wanted


def test_what_export_returned_does_not_follow_the_stream() -> None:
    stream = RandomStream(7)
    tensors, plain = stream.export()
    kept, kept_plain = {name: t.clone() for name, t in tensors.items()}, json.dumps(plain)
    draws(stream, 3)
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)
    assert json.dumps(plain) == kept_plain


def test_seeds_differ_by_every_name_and_by_the_seed() -> None:
    seeds = [derive_seed(*key) for key in ((0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 2), (0, 1, "a"))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_derived_seed_is_the_same_in_every_process() -> None:
    # sha256('[3, "site", "north"]') begins with these four bytes; Python's own hash() would differ from run to run.
    assert derive_seed(3, "site", "north") == 0x16759D14


def test_names_are_not_run_together() -> None:
    assert derive_seed(0, "a", "b") != derive_seed(0, "a/b")
