"""An update's form on the wire: float32 as it is, float16, or int8 with a scale for each output row.

Rounding comes last at the site, and the server undoes the form before it looks at a value, so that only these two know
of it. Alistarh et al., QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding, NeurIPS 2017,
https://arxiv.org/abs/1610.02132 (unbiased rounding; here scaled by the largest value of a row, not by its norm).

float16: A tensor is divided by the power of two that brings its largest value into [2^14, 2^15). Nothing overflows;
values down to 2^-28 of the largest keep a relative error of 2^-11, and smaller ones are off by 2^-39 of the largest at
most.

int8: A row x of axis 0 (a tensor of less than two axes is one row) is s c with s = max|x| / 127 and whole numbers c in
[-127, 127]. x / s is rounded up with a probability of its fractional part, so that the expected value is x and errors
cancel over sites and rounds. Rounding to the nearest has less error in one update, by a factor of the square root of
two; but it takes from a row of few large and many small values the small ones, in each round again.
"""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fedcmt.params import ParameterError, Params, check_shapes, is_dense, shapes

UPDATE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
"""Setting ``server.update_dtype`` to the type of the numbers that travel."""

SCALE_SUFFIX = "#scale"
"""``<name>#scale`` holds the scales of the tensor ``<name>``: float32, one for each row, or one for all (no axis)."""

_LEVELS = 127
_HALF_EXPONENT = 15
_LEAST_EXPONENT = -126
"""Of a normal float32."""


def encode(delta: Mapping[str, Tensor], dtype: str, *, seed: int) -> Params:
    """What travels for an update.

    Args:
      delta: Name to float32 tensor; left as it is. NaN or infinity come out of `decode` as NaN or infinity.
      dtype: A key of `UPDATE_DTYPES`.
      seed: Of the rounding to int8; another one for each site and round.

    Returns:
      Under "float32" the same tensors; otherwise, for each, a tensor of its name and shape, and its scales.

    Raises:
      ParameterError: If ``dtype`` is unknown, a tensor is not float32, or a name ends like one of scales.
    """
    if dtype not in UPDATE_DTYPES:
        raise ParameterError(f"encode: update_dtype is {dtype!r}, expected {', '.join(UPDATE_DTYPES)}")
    if dtype == "float32":
        return dict(delta)
    _check_plain(delta)
    generator = torch.Generator().manual_seed(seed)
    encoded: Params = {}
    for name, tensor in delta.items():
        coded = _half(tensor) if dtype == "float16" else _bytes(tensor, generator)
        encoded[name], encoded[name + SCALE_SUFFIX] = coded
    return encoded


def decode(encoded: Mapping[str, Tensor], dtype: str, *, where: str) -> Params:
    """The update that `encode` was given, as float32 and rounded.

    Args:
      encoded: What arrived; not trusted.
      dtype: What the site was asked for.
      where: For errors.

    Raises:
      ParameterError: If a tensor has another type than was asked for, or its scales are missing or of another form.
        Under "float32" whatever arrived is returned.
    """
    if dtype == "float32":
        return dict(encoded)
    foreign = sorted(n for n, t in encoded.items() if not is_dense(t))
    if foreign:
        raise ParameterError(f"{where}: {foreign[:4]} are not dense torch tensors")
    codes = {name: tensor for name, tensor in encoded.items() if not name.endswith(SCALE_SUFFIX)}
    scales = {name + SCALE_SUFFIX: _scale_shape(tensor, dtype) for name, tensor in codes.items()}
    check_shapes(encoded, shapes(codes) | scales, where=where)
    for name, tensor in encoded.items():
        expected = UPDATE_DTYPES[dtype] if name in codes else torch.float32
        if tensor.dtype != expected:
            raise ParameterError(f"{where}: {name} is {tensor.dtype}, expected {expected} under update_dtype {dtype}")
    return values(encoded)


def values(encoded: Mapping[str, Tensor]) -> Params:
    """Each tensor times its scales, in float32; one without scales is as it is."""
    return {
        name: _scaled(tensor, encoded[name + SCALE_SUFFIX]) if name + SCALE_SUFFIX in encoded else tensor
        for name, tensor in encoded.items()
        if owner(name, encoded) == name
    }


def owner(name: str, names: Collection[str]) -> str:
    """Whose scales a name stands for; the name itself if it stands for none of ``names``' scales."""
    base = name.removesuffix(SCALE_SUFFIX)
    return base if base in names else name


def _check_plain(delta: Mapping[str, Tensor]) -> None:
    for name, tensor in delta.items():
        if name.endswith(SCALE_SUFFIX):
            raise ParameterError(f"encode: {name} ends with {SCALE_SUFFIX}, which is for scales; rename the channel")
        if tensor.dtype != torch.float32:
            raise ParameterError(f"encode: {name} is {tensor.dtype}, expected torch.float32")


def _half(tensor: Tensor) -> tuple[Tensor, Tensor]:
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    scale = 2.0 ** max(math.frexp(largest)[1] - _HALF_EXPONENT, _LEAST_EXPONENT)
    return (tensor / scale).half(), torch.tensor(scale)


def _bytes(tensor: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    scale = _largest(tensor) / _LEVELS
    exact = tensor / _by_row(scale, tensor)
    below = exact.floor()
    up = torch.rand(exact.shape, generator=generator) < exact - below
    # The largest may come to more than 127, and scales may be 0 or not finite: the latter show in every product.
    return (below + up).nan_to_num().clamp(-_LEVELS, _LEVELS).to(torch.int8), scale


def _largest(tensor: Tensor) -> Tensor:
    """Largest absolute value of each row, in the form of scales; NaN where there is one."""
    if not tensor.numel():
        return torch.zeros(_scale_shape(tensor, "int8"))
    return tensor.abs().flatten(1).amax(1) if tensor.dim() > 1 else tensor.abs().max()


def _scale_shape(tensor: Tensor, dtype: str) -> tuple[int, ...]:
    return (len(tensor),) if dtype == "int8" and tensor.dim() > 1 else ()


def _by_row(scale: Tensor, tensor: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (tensor.dim() - 1)) if scale.dim() else scale


def _scaled(tensor: Tensor, scale: Tensor) -> Tensor:
    return tensor.float() * _by_row(scale, tensor)
