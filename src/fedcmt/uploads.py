"""Uploads on disk: a round's updates in files, so that the server's memory does not grow with its sites.

What streams over tensors (`fedcmt.algorithms.conflict_averse`) asks for one tensor of each update at a time, and no
more than these are mapped.
"""

import secrets
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from fedcmt.params import ParameterError, is_dense

_FILES = "upload-*.bin"
_ALIGNMENT = 16
"""Bytes; a multiple of every type's size, as reading a tensor in place asks for."""


class _Place(NamedTuple):
    """Where a tensor is in its file: its bytes, its type and shape."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: torch.Size


class StoredTensors(Mapping[str, Tensor]):
    """Tensors in a file. Each is mapped anew whenever it is asked for, and unmapped once nothing refers to it.

    So a tensor stays readable for as long as it is referred to, even if the file is deleted meanwhile, and writing to
    it changes neither the file nor what is asked for later. Asking raises RuntimeError once the file is gone.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self._path = path
        with path.open("wb") as file:
            self._places = {name: _write(file, tensor) for name, tensor in tensors.items()}
            file.write(bytes(_ALIGNMENT))  # a file of nothing cannot be mapped
            self._size = file.tell()

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        content = torch.from_file(str(self._path), shared=False, size=self._size, dtype=torch.uint8)
        return content[place.start : place.stop].view(place.dtype).view(place.shape)

    def __contains__(self, name: object) -> bool:  # the default would map the tensor to see that it is there
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class SpooledUpdates:
    """One round's uploads, one file each, deleted when the round is closed.

    ``with SpooledUpdates(folder) as spool: update = spool.add(site, tensors)``

    Args:
      folder: Where the files go; created if missing. Files that a killed process left there are deleted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sites: list[str] = []
        self._lock = threading.Lock()  # answers may arrive on several threads
        self.close()

    def __enter__(self) -> "SpooledUpdates":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, site: str, tensors: Mapping[str, Tensor]) -> StoredTensors:
        """Write one site's upload to its file.

        Args:
          site: Its name, new to this round.
          tensors: Any types, shapes and strides; what else refers to them keeps them in memory.

        Returns:
          The same names, types, shapes and values.

        Raises:
          ParameterError: If the site is already in, or a value is not a dense torch tensor.
          OSError: If the file cannot be written.
        """
        foreign = [n for n, t in tensors.items() if not is_dense(t)]
        if foreign:
            raise ParameterError(f"upload of {site!r}: {sorted(foreign)[:4]} are not dense torch tensors")
        with self._lock:
            if site in self._sites:
                raise ParameterError(f"upload of {site!r}: is already in {self._folder}; one upload a site and round")
            self._sites.append(site)
        self._folder.mkdir(parents=True, exist_ok=True)
        # No number: an upload that is still being written when its task times out must not meet the next round's.
        return StoredTensors(self._folder / _FILES.replace("*", secrets.token_hex(8)), tensors)

    def close(self) -> None:
        """Delete the files; their space is free once no mapped tensor is referred to."""
        for path in self._folder.glob(_FILES):
            path.unlink()
        self._sites.clear()


def _write(file: BinaryIO, tensor: Tensor) -> _Place:
    file.write(bytes(-file.tell() % _ALIGNMENT))
    start = file.tell()
    file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return _Place(start, file.tell(), tensor.dtype, tensor.shape)
