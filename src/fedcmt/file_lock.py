"""One process at a time: a lock that the system takes back when its holder ends, however that happens."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class InUseError(RuntimeError):
    """Another process holds the lock."""


@contextmanager
def exclusive(file: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of a file, which is made if need be.

    Args:
      file: What all who are to take turns agree on.
      on_wait: Called once before waiting for another holder; without it there is no waiting.

    Raises:
      InUseError: If another process holds the lock and there is no ``on_wait``.
      OSError: If the file cannot be written.
    """
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if on_wait is None:
                raise InUseError(f"{file.parent} is in use by another process") from error
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
