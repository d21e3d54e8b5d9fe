"""One random stream per site: several sites in one process must not disturb each other, nor the caller.

nnU-Net draws from the global generators of ``random``, numpy and torch. A site owns a copy of their states and swaps
it in for as long as it works, so that a run gives the same numbers whether sites are processes or objects, and can be
resumed.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, *names: object) -> int:
    """A 32-bit seed that depends on ``seed`` and on every name, and on nothing else."""
    digest = hashlib.sha256(json.dumps([seed, *map(str, names)]).encode()).digest()
    return int.from_bytes(digest[:4], "big")


class RandomStream:
    """The states of the three global generators, as they would be if only the owner drew from them.

    CUDA generators are not part of it: training on a GPU is not repeatable bit by bit.
    """

    def __init__(self, seed: int) -> None:
        with _preserved():
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 (nnU-Net draws from the legacy global generator)
            torch.manual_seed(seed)
            self._states = _capture()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this stream the global one; the caller's is restored afterwards, and this one remembers where it was."""
        with _preserved():
            _restore(self._states)
            try:
                yield
            finally:
                self._states = _capture()

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values that `load` takes, for storing on disk."""
        (version, key, gauss), (name, keys, pos, has_gauss, cached), torch_state = self._states
        tensors = {"python": torch.tensor(key), "numpy": torch.from_numpy(keys.astype(np.int64)), "torch": torch_state}
        return tensors, {"python": [version, gauss], "numpy": [name, int(pos), int(has_gauss), float(cached)]}

    def load(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Continue where `export` was called."""
        version, gauss = plain["python"]
        name, pos, has_gauss, cached = plain["numpy"]
        keys = tensors["numpy"].numpy().astype(np.uint32)
        python = (version, tuple(tensors["python"].tolist()), gauss)
        self._states = (python, (name, keys, pos, has_gauss, cached), tensors["torch"])


def _capture() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def _restore(states: tuple[Any, Any, Tensor]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


@contextmanager
def _preserved() -> Iterator[None]:
    states = _capture()
    try:
        yield
    finally:
        _restore(states)
