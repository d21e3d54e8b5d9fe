"""Progress of long work as log lines: at most one every few seconds, with the time that is left."""

import logging
import time


class Progress:
    """Counts one piece of work.

    Args:
      title: What is being done, e.g. "client1: round 3/20".
      logger: Where lines go, at level INFO.
      every_seconds: Shortest time between two lines.
    """

    def __init__(self, title: str, logger: logging.Logger, every_seconds: float = 10.0) -> None:
        self._title = title
        self._logger = logger
        self._every = every_seconds
        self._started = self._last = time.monotonic()

    def update(self, done: int, total: int, note: str = "") -> None:
        """Tell that ``done`` of ``total`` parts are done."""
        now = time.monotonic()
        if now - self._last < self._every or done == 0:
            return
        self._last = now
        left = (now - self._started) / done * (total - done)
        tail = f", {note}" if note else ""
        self._logger.info("%s: %d/%d%s, %.0f s left", self._title, done, total, tail, left)
