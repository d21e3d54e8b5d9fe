"""Gaussian noise: from the operating system's generator where it must protect, from a seed where it must repeat.

Both sources draw ordinary floating-point numbers. Which numbers a sum "value + noise" can take at all depends a little
on the value (Mironov, On Significance of the Least Significant Bits for Differential Privacy, CCS 2012), so a receiver
of exact bits may learn more than the accounted epsilon says. Rounding to float32 after a draw in float64 narrows this
gap and does not close it: it is a residual risk that the accountants do not count.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedcmt.params import Params, check_finite, check_names
from fedcmt.settings import is_int, is_number, require

_WHERE = "add_noise"
_PAIRS = 2**18
"""Pairs of numbers drawn at a time: 4 MiB of random bytes, and some 10 MiB of float64 on the way."""
_BITS = 53


class NoiseSource(Protocol):
    """Where noise comes from."""

    def normal(self, shape: Sequence[int], /) -> Tensor:
        """Independent standard normal numbers, float32, on the CPU."""


class SecureNoise:
    """Noise nobody can repeat: ``os.urandom``, with neither a seed nor a state to leak.

    Box and Muller's transform of two uniform numbers of 53 bits each, in float64. The largest magnitude is 8.57, which
    a true normal number exceeds with probability 1e-17.
    """

    def normal(self, shape: Sequence[int], /) -> Tensor:
        """Independent standard normal numbers, float32, on the CPU."""
        numbers = torch.empty(math.prod(shape), dtype=torch.float32)
        for part in numbers.split(2 * _PAIRS):
            half = (len(part) + 1) // 2
            pair = _normal_pairs(half)
            part[:half] = pair[0]
            part[half:] = pair[1, : len(part) - half]
        return numbers.reshape(tuple(shape))


class SeededNoise:
    """Noise that repeats, for simulations and tests; it hides nothing from whoever knows or guesses the seed.

    Two sources of one seed give the same numbers, and noise that is used twice cancels: the seed must differ by round
    and by site (`fedcmt.randomness.derive_seed`).

    Args:
      seed: From 0, below 2^63.
    """

    def __init__(self, seed: int) -> None:
        require(is_int(seed) and 0 <= seed < 2**63, "SeededNoise", "seed", seed, "a whole number from 0, below 2^63")
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: Sequence[int], /) -> Tensor:
        """The next standard normal numbers of the seed's sequence, float32, on the CPU."""
        return torch.randn(tuple(shape), generator=self._generator)


def add_noise(params: Params, std: float | Mapping[str, float], source: NoiseSource) -> Params:
    """``params + N(0, std^2)``, independently for each element, one draw per tensor, in the order of ``params``.

    Args:
      params: Name to tensor; left as it is. Names from ``named_parameters()``: a tied tensor that had two would get two
        draws, whose mean has less noise.
      std: Standard deviation >= 0, one for all or one for each name.
      source: Of the numbers.

    Returns:
      New tensors on the same devices. Noise is float32; 16-bit tensors become float32, float64 stay so.

    Raises:
      ValueError: If a standard deviation is not a number from 0.
      ParameterError: If ``std`` has other names than ``params``, or a tensor holds NaN, infinity or integers.
    """
    stds = dict(std) if isinstance(std, Mapping) else dict.fromkeys(params, std)
    check_names(stds, params, where=f"{_WHERE}: std")
    for name, value in stds.items():
        require(is_number(value) and value >= 0, _WHERE, f"std of {name}", value, "a number from 0")
    check_finite(params, where=_WHERE)
    return {name: t + stds[name] * source.normal(t.shape).to(t.device) for name, t in params.items()}


def _normal_pairs(count: int) -> Tensor:
    """[2, count] independent standard normal numbers, float64."""
    bits = torch.frombuffer(bytearray(os.urandom(2 * 8 * max(count, 1))), dtype=torch.int64).view(2, -1)[:, :count]
    # In (0, 1]: the logarithm of 0 is not wanted, and as an angle 1 is as good as 0.
    uniform = ((bits & (2**_BITS - 1)) + 1).to(torch.float64).mul_(2.0**-_BITS)
    radius = uniform[0].log_().mul_(-2).sqrt_()
    angle = uniform[1].mul_(2 * math.pi)
    return torch.stack([angle.cos(), angle.sin()]).mul_(radius)
