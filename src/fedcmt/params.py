"""Named tensors: reading them from a network, copying them back, comparing, checking and storing them.

Names come from ``named_parameters()``, never from ``state_dict()``: nnU-Net's decoder keeps a reference to the
encoder, so a state_dict holds every encoder tensor four times, and a strict load of a merged one silently keeps the
old encoder.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Params = dict[str, Tensor]

Tensors = Mapping[str, Tensor]
"""Named tensors that are only read; those of an update may be in a file."""

_META_KEY = "fedcmt"
_CHECKSUM_KEY = "fedcmt_sha256"


class ParameterError(ValueError):
    """Tensors whose names, shapes or values are not what the receiver holds."""


class Selection(Mapping[str, Tensor]):
    """Some of a mapping's tensors, each asked for when it is needed: those in a file are not all mapped at once.

    Args:
      tensors: The whole mapping.
      names: Which of its names are in; their order is kept.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
        self._tensors = tensors
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:  # the default would ask for the tensor
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def named_tensors(network: nn.Module) -> Params:
    """The network's parameters by their one canonical name, as detached views (no copy).

    Raises:
      ParameterError: If the network has buffers such as running statistics: who averages those is undefined here.
    """
    buffers = [name for name, _ in network.named_buffers()]
    if buffers:
        raise ParameterError(
            f"network {type(network).__name__} has buffers {_shorten(buffers)}; only parameters are federated. "
            "Use instance or group normalisation without running statistics."
        )
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def snapshot(network: nn.Module) -> Params:
    """Independent copies of the network's parameters on the CPU."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in named_tensors(network).items()}


@torch.no_grad()
def copy_into(network: nn.Module, tensors: Mapping[str, Tensor], *, where: str = "copy_into") -> None:
    """Copy tensors into the network's parameters of the same names, in place.

    In place keeps each ``Parameter`` object, so optimiser state (momentum, Adam moments) stays attached to it.

    Raises:
      ParameterError: If a name is unknown or a shape differs. Nothing is written then.
    """
    own = dict(network.named_parameters())
    check_shapes(tensors, {name: tuple(p.shape) for name, p in own.items() if name in tensors}, where=where)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def delta(trained: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> Params:
    """``trained - received``; both must hold the same names and shapes."""
    check_shapes(trained, shapes(received), where="delta")
    return {name: trained[name] - received[name] for name in trained}


def take_rows(tensors: Mapping[str, Tensor], rows: Mapping[str, Sequence[int]]) -> Params:
    """The chosen rows (axis 0) of each tensor; a name that is not in ``rows`` stays whole, one without a row is left
    out."""
    return {
        name: tensor[list(rows[name])] if name in rows else tensor
        for name, tensor in tensors.items()
        if name not in rows or rows[name]
    }


def put_rows(
    tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor], rows: Mapping[str, Sequence[int]], *, where: str
) -> Params:
    """The inverse of `take_rows`: tensors with the chosen rows replaced, as copies; what ``parts`` has whole stays.

    Raises:
      ParameterError: If rows name an unknown tensor, lie outside of one, or do not have the form of the parts.
    """
    whole = dict(parts)
    for name, chosen in rows.items():
        if name not in tensors or any(not 0 <= row < len(tensors[name]) for row in chosen):
            raise ParameterError(f"{where}: rows {list(chosen)[:4]} of {name}, which has no such rows")
        expected = (len(chosen), *tensors[name].shape[1:])
        if chosen:
            check_shapes({name: whole.get(name, torch.empty(0))}, {name: expected}, where=where)
        whole[name] = tensors[name].clone()
        if chosen:
            whole[name][list(chosen)] = parts[name].to(whole[name].dtype)
    return whole


def norm(tensors: Mapping[str, Tensor]) -> float:
    """L2 norm over all elements of all tensors."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors.values()))


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name to shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def is_dense(value: object) -> TypeGuard[Tensor]:
    """Whether this is a tensor with a value for each of its numbers: not sparse, quantized or without memory."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_meta or value.is_quantized)


def check_names(got: Collection[str], expected: Collection[str], *, where: str) -> None:
    """Raise `ParameterError` naming what is missing and what is unknown."""
    missing, unknown = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    if missing or unknown:
        raise ParameterError(
            f"{where}: {len(missing)} parameters missing {_shorten(missing)}, {len(unknown)} unknown "
            f"{_shorten(unknown)}. "
            "Both ends must use the same plans and the same scope rules."
        )


def check_shapes(got: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Raise `ParameterError` if names or shapes differ; nothing is ever reshaped to fit."""
    check_names(got, expected, where=where)
    wrong = [f"{n} {tuple(t.shape)} instead of {tuple(expected[n])}" for n, t in got.items() if t.shape != expected[n]]
    if wrong:
        raise ParameterError(f"{where}: {len(wrong)} tensors have another shape: {_shorten(wrong)}.")


def check_finite(tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Raise `ParameterError` naming the tensors that hold NaN or infinity, or no floating-point numbers at all."""
    integers = [f"{name} {tensor.dtype}" for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if integers:
        raise ParameterError(f"{where}: {len(integers)} tensors are not floating point: {_shorten(integers)}.")
    bad = [name for name, tensor in tensors.items() if tensor.numel() and not _is_finite(tensor)]
    if bad:
        raise ParameterError(f"{where}: {len(bad)} tensors are not finite: {_shorten(bad)}.")


def _is_finite(tensor: Tensor) -> bool:
    """By the extremes, which a NaN becomes: seven times faster than a mask of every number."""
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor))


def serialized_size(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Bytes of the tensors alone, and of their safetensors form with its header, without writing it."""
    offset, header = 0, {}
    # safetensors' own order: widest type first, then by name.
    for name in sorted(tensors, key=lambda n: (-_SAFETENSORS_ORDER.index(tensors[n].dtype), n)):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        dtype = _SAFETENSORS_DTYPE[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    head = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return offset, 8 + (head + 7) // 8 * 8 + offset


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, object],
    *,
    before: Path | None = None,
) -> None:
    """Write tensors and plain values as one safetensors file, atomically: readers see the old file or the new one.

    Args:
      path: The file; its folder is made if needed.
      tensors: Name to tensor, of any type and stride.
      meta: What `json` can write.
      before: Where the file that was at ``path`` goes once the new one is complete; None replaces it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    plain, values = _storable(tensors), json.dumps(meta)
    try:
        save_file(plain, temporary, metadata={_META_KEY: values, _CHECKSUM_KEY: _checksum(plain, values)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if before is not None and path.exists():
            path.replace(before)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(
    path: Path, *, needs: Collection[str] = (), expects: Mapping[str, object] = MappingProxyType({})
) -> tuple[Params, dict]:
    """Read what `save_tensors` wrote, which must be there to the bit: tensors on the CPU and the plain values.

    Args:
      path: The file.
      needs: Keys that its plain values must have.
      expects: Plain values that say whose state it is.

    Raises:
      FileNotFoundError: If there is no such file.
      ParameterError: If the file is not one of ours, is of another kind, version or owner, or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such state file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        values = metadata[_META_KEY]
        if metadata[_CHECKSUM_KEY] != _checksum(tensors, values):
            raise ValueError("its checksum is not that of its content")
        meta = json.loads(values)
        if missing := sorted({*needs, *expects} - set(meta)):
            raise ValueError(f"it lacks {_shorten(missing)}")
        if foreign := [f"{key} {meta[key]!r}, not {own!r}" for key, own in expects.items() if meta[key] != own]:
            raise ValueError(f"it is of {_shorten(foreign)}")
        return tensors, meta
    except KeyError as error:
        raise _unreadable(path, f"it has no {error}: of another program or version, or damaged") from error
    except (SafetensorError, ValueError) as error:
        raise _unreadable(path, str(error)) from error


def load_newest(
    newest: Path,
    before: Path,
    *,
    needs: Collection[str] = (),
    expects: Mapping[str, object] = MappingProxyType({}),
) -> tuple[Params, dict]:
    """Read a state, or the one before it if the newest is damaged, another's, or was never completed.

    The state that was read is at ``newest`` afterwards. A damaged one is kept beside it, under its name with
    ``.damaged`` behind it.

    Args:
      newest: What `save_tensors` wrote last.
      before: What its argument ``before`` was.
      needs: As in `load_tensors`.
      expects: As in `load_tensors`.

    Raises:
      FileNotFoundError: If there is neither.
      ParameterError: If neither can be read.
    """
    load = partial(load_tensors, needs=needs, expects=expects)
    if not before.exists():
        return load(newest)
    if newest.exists():
        try:
            return load(newest)
        except ParameterError as damage:
            found = _load_before(load, before, damage)
            kept = newest.with_name(newest.name + ".damaged")
            newest.replace(kept)
            logger.error("%s Going on from the state before it, %s; the damaged one is now %s", damage, before, kept)
    else:
        found = load(before)
    before.replace(newest)
    return found


def _load_before(
    load: Callable[[Path], tuple[Params, dict]], before: Path, damage: ParameterError
) -> tuple[Params, dict]:
    try:
        return load(before)
    except ParameterError as error:
        raise ParameterError(f"{damage} Nor can the state before it be used: {error}") from error


def _storable(tensors: Mapping[str, Tensor]) -> Params:
    """On the CPU, contiguous, and each with memory of its own."""
    plain: Params = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().to("cpu").contiguous()
        # safetensors refuses two names for one memory, e.g. a buffer that starts as the parameter itself.
        plain[name] = own.clone() if own.untyped_storage().data_ptr() in seen else own
        seen.add(own.untyped_storage().data_ptr())
    return plain


def _checksum(tensors: Mapping[str, Tensor], values: str) -> str:
    """SHA-256 of the plain values and of every tensor's name, type, shape and bytes; safetensors itself has none."""
    digest = hashlib.sha256(values.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unreadable(path: Path, reason: str) -> ParameterError:
    return ParameterError(f"{path}: not a readable state file ({reason}). Remove it or restore an earlier one.")


_SAFETENSORS_DTYPE = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_SAFETENSORS_ORDER = list(_SAFETENSORS_DTYPE)


def _shorten(names: Collection[str], limit: int = 4) -> str:
    names = list(names)
    return "[" + ", ".join(names[:limit]) + (f", … {len(names) - limit} more]" if len(names) > limit else "]")
