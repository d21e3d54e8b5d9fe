"""What a check has to say: a line for people and the same for machines."""

from dataclasses import dataclass
from enum import StrEnum

_UNITS = ("B", "kB", "MB", "GB", "TB")


class Level(StrEnum):
    """How bad it is: a problem stops a job or spoils it, a warning may be meant so."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
      level: How bad it is.
      topic: What was looked at, e.g. "spacing".
      found: What there is.
      expected: What should be; empty where all is well.
      remedy: What to do, a sentence; empty where all is well.
    """

    level: Level
    topic: str
    found: str
    expected: str = ""
    remedy: str = ""

    def line(self) -> str:
        """As one line of a report."""
        text = self.found + (f"; expected {self.expected}" if self.expected else "")
        return f"{self.level:<8} {self.topic:<19} {text}" + (f". {self.remedy}" if self.remedy else "")


def ok(topic: str, found: str) -> Finding:
    """All is well, and this is what there is."""
    return Finding(Level.OK, topic, found)


def warning(topic: str, found: str, expected: str, remedy: str) -> Finding:
    """Something to look at, which may be right."""
    return Finding(Level.WARNING, topic, found, expected, remedy)


def problem(topic: str, found: str, expected: str = "", remedy: str = "") -> Finding:
    """Something that stops a job, or makes its result worthless."""
    return Finding(Level.PROBLEM, topic, found, expected, remedy)


def some(names: list[str], most: int = 4) -> str:
    """The first few names, and how many there are in all."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def readable_bytes(count: float) -> str:
    """Three digits and a decimal unit: 1 kB is 1000 B."""
    for unit in _UNITS[:-1]:
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {_UNITS[-1]}"


def readable_seconds(seconds: float) -> str:
    """Three digits in a unit that fits: s, min, h or days."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
