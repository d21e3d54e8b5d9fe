"""What travels between server and sites, whatever carries it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from fedcmt.params import Params, Tensors


class Task(StrEnum):
    """What the server asks of a site, in the order of a job."""

    FINGERPRINT = "fingerprint"
    PREPARE = "prepare"
    TRAIN = "train"
    EVALUATE = "evaluate"
    FINISH = "finish"


@dataclass(frozen=True)
class Message:
    """A request or its answer.

    Attributes:
      meta: Plain JSON values.
      tensors: Wire name to tensor.
      extras: Further named tensors of the algorithm.
    """

    meta: dict[str, Any]
    tensors: Tensors = field(default_factory=dict)
    extras: Params = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A site's answer when it could not do a task, or gave none in time."""

    reason: str


def failure_of(task: Task, error: BaseException) -> Failure:
    """What a site tells about an error: its kind only, since messages may name files; its own log has the rest."""
    return Failure(f"{type(error).__name__} in task {task.value!r}, explained in the site's log")


Keep = Callable[[str, Message], Message]
"""(site, its answer) -> what to hold of it until all answers are there."""


def as_it_is(site: str, answer: Message) -> Message:
    """Hold an answer in memory."""
    return answer


class Channel(Protocol):
    """An engine: carries one message to each site named and brings back one answer for each."""

    def exchange(
        self, task: Task, messages: Mapping[str, Message], keep: Keep = as_it_is
    ) -> dict[str, Message | Failure]:
        """Block until every site has answered, failed or run out of time.

        Each answer goes through ``keep`` as it arrives, on any thread; a ValueError or OSError there is its site's
        failure.
        """
        ...
