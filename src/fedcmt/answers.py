"""Sites' answers, read and checked: an answer that is not to what was asked costs its site its part, by name."""

import json
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from fedcmt.algorithms.base import Participant, Update
from fedcmt.messages import Channel, Failure, Keep, Message, Task, as_it_is
from fedcmt.params import ParameterError, Params, Tensors, check_finite, check_shapes, is_dense, shapes
from fedcmt.settings import is_int

_MOST_CASES = 10**7
_MOST_STEPS = 10**9
_MOST_METRICS = 100
_LONGEST_NAME = 100
_LARGEST_METRIC = 1e12
"""A loss; a mean of much larger numbers overflows."""
_LONGEST_META = 10**7
"""Characters of an answer's plain values as JSON; the fingerprint of a large data set has some 10^5."""
_LARGEST_VALUE = 1e6
"""Of one weight's change in one round; weights are of the order of 1, and squares of much larger numbers overflow
float32."""
_LONGEST_REASON = 300


class CheckedChannel:
    """A channel whose answers are to what was asked; any other is its site's failure, refused as it arrives.

    Args:
      channel: The engine's.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def exchange(
        self, task: Task, messages: Mapping[str, Message], keep: Keep = as_it_is
    ) -> dict[str, Message | Failure]:
        """One answer or failure for each site that was asked, with the reason on one line.

        An answer that arrives once this has returned is not kept: its round has closed without it.
        """
        refused: dict[str, Failure] = {}
        closed = False

        def keep_if_asked(site: str, answer: Message) -> Message:
            try:
                if closed:
                    raise ParameterError(f"an answer to task {task.value!r} came after the task had ended")
                check_answer(task, site, messages.get(site), answer)
                return keep(site, answer)
            except ParameterError as error:
                refused[site] = Failure(str(error))
                raise

        try:
            answers = dict(self._channel.exchange(task, messages, keep_if_asked))
        finally:
            closed = True
        answers |= refused
        return {site: _in_one_line(answers.get(site, Failure("no answer"))) for site in messages}


def check_answer(task: Task, site: str, request: Message | None, answer: Message) -> None:
    """Refuse what is not an answer to this request.

    Raises:
      ParameterError: If nothing was asked of the site, the answer is of another round, task or site, its plain values
        are none or too many, or it has tensors that are no tensors or that this task does not ask for.
    """
    if request is None:
        raise ParameterError(f"nothing was asked of site {site!r} in task {task.value!r}")
    if not isinstance(answer.meta, dict):
        raise ParameterError(f"meta is of type {type(answer.meta).__name__}, expected an object")
    expected = {"task": task.value, "site": site, "round": request.meta.get("round")}
    for key, value in expected.items():
        stated = answer.meta.get(key)
        if stated != value or isinstance(stated, bool):
            raise ParameterError(f"is of {key} {_short(stated)}, expected {value!r}")
    if (length := len(json.dumps(answer.meta))) > _LONGEST_META:
        raise ParameterError(f"has {length} characters of plain values, at most {_LONGEST_META} are taken")
    tensors = {**answer.tensors, **answer.extras}
    if tensors and task is not Task.TRAIN:
        raise ParameterError(
            f"has tensors {_short(sorted(map(str, tensors))[:4])}, which {task.value!r} does not ask for"
        )
    foreign = [name for name, tensor in tensors.items() if not is_dense(tensor)]
    if foreign:
        raise ParameterError(f"{_short(sorted(map(str, foreign))[:4])} are not dense torch tensors")


def read_introduction(answer: Message) -> tuple[dict[str, Any], str]:
    """A site's fingerprint, which the planner checks, and its modality.

    Raises:
      ParameterError: If one is missing.
    """
    fingerprint, modality = answer.meta.get("fingerprint"), answer.meta.get("modality")
    if not (isinstance(fingerprint, dict) and isinstance(modality, str) and modality.strip()):
        raise ParameterError(
            f"fingerprint of type {type(fingerprint).__name__}, modality {_short(modality)}; expected an object and a "
            "name such as MR"
        )
    return fingerprint, modality


def read_participant(site: str, modality: str, fingerprint: Mapping[str, Any], answer: Message) -> Participant:
    """What a prepared site says of itself.

    Raises:
      ParameterError: If a value is missing or cannot be.
    """
    cases, channels, wire = (answer.meta.get(key) for key in ("num_cases", "channels", "wire_shapes"))
    if not (is_int(cases) and 1 <= cases < _MOST_CASES and _are_names(channels) and isinstance(wire, dict)):
        raise ParameterError(
            f"num_cases {_short(cases)}, channels {_short(channels)}, wire_shapes of type {type(wire).__name__}; "
            "expected a whole number from 1, a list of names and an object"
        )
    described = fingerprint.get("num_cases", cases)
    if cases > described:
        raise ParameterError(f"num_cases {cases} for training, but its fingerprint is of {described} cases")
    wrong = [name for name, shape in wire.items() if not _is_shape(shape)]
    if wrong:
        raise ParameterError(f"wire_shapes of {_short(wrong[:4])} are no lists of whole numbers from 0")
    role = answer.meta.get("role", "site")
    if role not in ("site", "fusion"):
        raise ParameterError(f"role is {_short(role)}, expected site or fusion")
    return Participant(site, modality, tuple(channels), cases, {n: tuple(shape) for n, shape in wire.items()}, role)


def read_update(answer: Message, site: Participant, request: Message, *, takes_extras: bool) -> Update:
    """The update in a site's answer to a request.

    Its weight is the number of cases that the site stated when it was prepared, whatever the answer says.

    Args:
      answer: After `check_answer`.
      site: Who answers.
      request: What was asked.
      takes_extras: Whether the algorithm has sites send extras.

    Raises:
      ParameterError: If a tensor is missing, unknown, of another shape or type, not finite or too large, all are zero,
        or what comes with it is not what was asked for.
    """
    where = f"update of site {site.name!r}"
    steps = answer.meta.get("num_steps")
    if not is_int(steps) or not 1 <= steps <= _MOST_STEPS:
        raise ParameterError(f"{where}: num_steps is {_short(steps)}, expected a whole number from 1")
    metrics = _read_metrics(answer.meta.get("metrics"), where)
    expected = {name: shape for name, shape in shapes(request.tensors).items() if name not in request.meta["frozen"]}
    check_shapes(answer.tensors, expected, where=where)
    _check_types(answer.tensors, request.tensors, where)
    check_finite(answer.tensors, where=where)
    _check_size(answer.tensors, where)
    _check_extras(answer.extras, request, takes_extras, where)
    return Update(answer.tensors, site.num_cases, steps, metrics, answer.extras)


def read_report(answer: Message) -> dict[str, Any]:
    """A finished site's report.

    Raises:
      ParameterError: If there is none.
    """
    report = answer.meta.get("report")
    if not isinstance(report, dict):
        raise ParameterError(f"report is of type {type(report).__name__}, expected an object")
    return report


def _read_metrics(metrics: object, where: str) -> dict[str, float]:
    if not isinstance(metrics, dict) or not all(isinstance(v, float) and math.isfinite(v) for v in metrics.values()):
        raise ParameterError(f"{where}: metrics are {_short(metrics)}, expected finite numbers by name")
    long = [name for name in metrics if len(name) > _LONGEST_NAME or not name.isprintable()]
    if len(metrics) > _MOST_METRICS or long:
        raise ParameterError(
            f"{where}: {len(metrics)} metrics, {len(long)} of them with long names or such that cannot be printed; "
            f"expected at most {_MOST_METRICS}, with names of at most {_LONGEST_NAME} characters"
        )
    if beyond := {name: value for name, value in metrics.items() if name.startswith("val_") and not 0 <= value <= 1}:
        raise ParameterError(f"{where}: validation scores {_short(beyond)} are not in [0, 1]")
    if huge := {name: value for name, value in metrics.items() if abs(value) > _LARGEST_METRIC}:
        raise ParameterError(f"{where}: metrics {_short(huge)} are beyond {_LARGEST_METRIC:.0e}")
    return metrics


def _check_types(delta: Tensors, received: Tensors, where: str) -> None:
    """Raise `ParameterError` if an update has other types than what it is an update of."""
    wrong = [f"{n} {t.dtype} instead of {received[n].dtype}" for n, t in delta.items() if t.dtype != received[n].dtype]
    if wrong:
        raise ParameterError(f"{where}: {len(wrong)} tensors have another type: {wrong[:4]}")


def _check_size(delta: Tensors, where: str) -> None:
    """Raise `ParameterError` if an update is zero or beyond anything that training does to weights."""
    largest = _largest(delta)
    if largest and not any(largest.values()):
        raise ParameterError(f"{where}: is zero everywhere; the site has not trained")
    if beyond := sorted(name for name, value in largest.items() if value > _LARGEST_VALUE):
        raise ParameterError(
            f"{where}: {beyond[0]} changes by {largest[beyond[0]]:.3g}, at most {_LARGEST_VALUE:.0e} is taken"
        )


def _check_extras(extras: Params, request: Message, takes_extras: bool, where: str) -> None:
    """Raise `ParameterError` if there are extras without need, or larger ones than anything that was sent out."""
    if not extras:
        return
    if not takes_extras:
        raise ParameterError(f"{where}: has extras {_short(sorted(extras)[:4])}, and the algorithm asks for none")
    check_finite(extras, where=where)
    most = sum(tensor.numel() for sent in (request.tensors, request.extras) for tensor in sent.values())
    if (count := sum(tensor.numel() for tensor in extras.values())) > most:
        raise ParameterError(f"{where}: extras have {count} values, more than the {most} that the site received")
    if beyond := sorted(name for name, value in _largest(extras).items() if value > _LARGEST_VALUE):
        raise ParameterError(f"{where}: extras {_short(beyond[:4])} have values beyond {_LARGEST_VALUE:.0e}")


def _largest(tensors: Tensors) -> dict[str, float]:
    return {name: float(tensor.abs().max()) for name, tensor in tensors.items() if tensor.numel()}


def _are_names(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(is_int(length) and length >= 0 for length in value)


def _in_one_line(answer: Message | Failure) -> Message | Failure:
    """A site words its failures, and they end up in logs and tables."""
    if isinstance(answer, Message):
        return answer
    line = "".join(c if c.isprintable() else " " for c in str(answer.reason))
    return Failure(line if len(line) <= _LONGEST_REASON else line[:_LONGEST_REASON] + "…")


def _short(value: object) -> str:
    """As an error may show it; a site chooses its length."""
    text = repr(value)
    return text if len(text) <= _LONGEST_NAME else text[:_LONGEST_NAME] + "…"
