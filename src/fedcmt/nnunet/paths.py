"""nnU-Net's folders: the environment variables it reads them from."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedcmt.workspace import environment

# The environment is one per process, and several sites may live in one process.
_ENVIRONMENT = threading.RLock()


@contextmanager
def nnunet_paths(
    raw: Path | None = None, preprocessed: Path | None = None, results: Path | None = None
) -> Iterator[None]:
    """Set nnU-Net's folder variables for the length of the block and restore them afterwards, also after an error.

    nnU-Net reads them at each use. A process has only one environment, so a second thread waits here until the block of
    the first ends: keep blocks short, and do not hold one while training. None leaves a variable as it is.
    """
    wanted = {"nnUNet_raw": raw, "nnUNet_preprocessed": preprocessed, "nnUNet_results": results}
    with _ENVIRONMENT, environment({name: str(path) for name, path in wanted.items() if path is not None}):
        yield
