"""Flat clipping: one bound on the 2-norm of an update, over all its tensors jointly.

McMahan et al., Learning Differentially Private Recurrent Language Models, ICLR 2018, https://arxiv.org/abs/1710.06963
(flat clipping).
"""

from fedcmt.params import ParameterError, Params, Tensors, check_finite, norm
from fedcmt.settings import is_number, require

_WHERE = "clip_flat"


def clip_flat(delta: Tensors, bound: float) -> tuple[Params, float]:
    """Scale an update into the ball of radius S: ``delta * min(1, S / norm)``, one factor for all tensors.

    Args:
      delta: Name to tensor, float32 or float64; left as it is. Names from ``named_parameters()``, so that a tied tensor
        counts once.
      bound: S > 0.

    Returns:
      New tensors of the same names, shapes and types, with a joint norm of at most ``S (1 + 1e-6)``, and the norm
      before. A zero update stays zero.

    Raises:
      ValueError: If the bound is not above 0.
      ParameterError: If a tensor holds NaN, infinity or integers, or is of 16 bits, in which rounding alone may leave
        the ball.
    """
    require(is_number(bound) and bound > 0, _WHERE, "bound", bound, "a number above 0")
    check_finite(delta, where=_WHERE)
    short = [f"{name} {tensor.dtype}" for name, tensor in delta.items() if tensor.dtype.itemsize < 4]
    if short:
        raise ParameterError(f"{_WHERE}: {len(short)} tensors have too few bits: {short[:4]}, expected torch.float32")
    length = norm(delta)
    factor = min(1.0, bound / length) if length > 0 else 1.0
    return {name: tensor * factor for name, tensor in delta.items()}, length
