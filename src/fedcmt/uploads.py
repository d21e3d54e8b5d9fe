"""Uploads on disk: a round's updates as memory-mapped files, so that the server's memory does not grow with its sites.

What streams over tensors (`fedcmt.algorithms.conflict_averse`) reads mapped ones where they are: their pages belong to
the file, and the system drops them when it needs room.
"""

import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch import Tensor

from fedcmt.params import ParameterError, Params, is_dense, load_tensors, save_tensors

_FILES = "upload-*.safetensors"


class SpooledUpdates:
    """One round's uploads, one safetensors file each, deleted when the round is closed.

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

    def add(self, site: str, tensors: Mapping[str, Tensor]) -> Params:
        """Write one site's upload to its file, and map it from there.

        Args:
          site: Its name, new to this round.
          tensors: Any types, shapes and strides; what else refers to them keeps them in memory.

        Returns:
          The same names, types, shapes and values. A tensor stays readable after `close` for as long as it is referred
          to; writing to one changes neither the file nor what a later `add` returns.

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
            # No number: an upload that is still being written when its task times out must not meet the next round's.
            path = self._folder / _FILES.replace("*", secrets.token_hex(8))
        save_tensors(path, tensors, {"site": site}, checksum=False)
        return load_tensors(path, checksum=False)[0]

    def close(self) -> None:
        """Delete the files; their space is free once no mapped tensor is referred to."""
        for path in self._folder.glob(_FILES):
            path.unlink()
        self._sites.clear()
