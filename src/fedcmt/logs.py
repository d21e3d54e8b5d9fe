"""Log lines that the launcher shows on the terminal, among all that FLARE's processes write."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fedcmt.workspace import WORKSPACE_VARIABLE

LAUNCHER_PREFIX = "fedcmt| "


def log_for_launcher(who: str) -> None:
    """In a process the launcher started, also write the package's log lines to its output, marked for it."""
    if WORKSPACE_VARIABLE not in os.environ:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_MarkedFormatter(f"%(asctime)s %(levelname).1s [{who}] %(message)s", "%H:%M:%S"))
    # FLARE's components log, with tracebacks, under module and class; our modules speak to the user.
    handler.addFilter(lambda record: record.name in sys.modules)
    package = logging.getLogger("fedcmt")
    package.handlers = [handler]
    package.setLevel(logging.INFO)


@contextmanager
def root_logger_unchanged() -> Iterator[None]:
    """Undo what a library does to the root logger, when it is imported or warns."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """Let a library's logger say nothing, and the root logger as it is."""
    logger = logging.getLogger(name)
    before = logger.disabled
    logger.disabled = True
    try:
        with root_logger_unchanged():
            yield
    finally:
        logger.disabled = before


class _MarkedFormatter(logging.Formatter):
    """Marks every line, also of messages of several lines; tracebacks are left to FLARE's own log."""

    def format(self, record: logging.LogRecord) -> str:
        line = self.formatMessage(self._prepared(record))
        return LAUNCHER_PREFIX + line.replace("\n", "\n" + LAUNCHER_PREFIX)

    def _prepared(self, record: logging.LogRecord) -> logging.LogRecord:
        record.message = record.getMessage()
        record.asctime = self.formatTime(record, self.datefmt)
        return record
