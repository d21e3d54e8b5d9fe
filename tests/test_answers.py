"""What is taken of a site's answer; `test_federation` has what refusing one does to a round."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcmt.algorithms.base import Participant
from fedcmt.answers import CheckedChannel, check_answer, read_participant, read_update
from fedcmt.messages import Failure, Keep, Message, Task, as_it_is
from fedcmt.params import ParameterError

REQUEST = Message({"round": 2, "frozen": ["f"]}, {"w": torch.zeros(2, 3), "f": torch.zeros(4)}, {"c": torch.zeros(5)})
OF_A = {"task": "train", "site": "a"}
ANSWER = Message({**OF_A, "round": 2, "num_steps": 7, "metrics": {"loss": 0.5}}, {"w": torch.ones(2, 3)})
SITE = Participant("a", "MR", ("T1",), 12, {"w": (2, 3), "f": (4,)})
PREPARED = {"num_cases": 4, "channels": ["T1"], "wire_shapes": {"w": [2, 3]}}


class Scripted:
    """Gives these answers whatever is asked, and to each exchange one of a site that was not asked."""

    def __init__(self, answers: Mapping[str, Message | Failure]) -> None:
        self._answers = answers
        self.keep: Keep = as_it_is

    def exchange(
        self, task: Task, messages: Mapping[str, Message], keep: Keep = as_it_is
    ) -> dict[str, Message | Failure]:
        self.keep = keep
        return {s: a if isinstance(a, Failure) else self._kept(s, a) for s, a in self._answers.items()}

    def _kept(self, site: str, answer: Message) -> Message | Failure:
        try:
            return self.keep(site, answer)
        except ValueError:
            return Failure("unreadable")


def refused(**change: Any) -> str:
    """Why an answer is refused once it is changed like this."""
    with pytest.raises(ParameterError) as error:
        check_answer(Task.TRAIN, "a", REQUEST, replace(ANSWER, **change))
    return str(error.value)


def test_an_answer_says_what_it_answers() -> None:
    check_answer(Task.TRAIN, "a", REQUEST, ANSWER)
    for key in ("task", "site", "round"):
        meta = {name: value for name, value in ANSWER.meta.items() if name != key}
        assert refused(meta=meta).startswith(f"is of {key} None, expected")


@pytest.mark.parametrize(("key", "value"), [("round", 1), ("round", None), ("task", "finish"), ("site", "b")])
def test_an_answer_of_something_else_is_refused_by_name(key: str, value: object) -> None:
    assert refused(meta={**ANSWER.meta, key: value}).startswith(f"is of {key} {value!r}, expected")


def test_true_is_no_round() -> None:
    with pytest.raises(ParameterError, match="is of round True, expected 1"):
        check_answer(Task.TRAIN, "a", Message({"round": 1}), replace(ANSWER, meta={**OF_A, "round": True}))


def test_what_is_no_tensor_is_refused_wherever_it_is() -> None:
    assert "['w'] are not dense" in refused(tensors={"w": [1.0]})
    assert "['x'] are not dense" in refused(extras={"x": "anchor"})
    assert "['w'] are not dense" in refused(tensors={"w": torch.eye(3).to_sparse()})


def test_only_training_brings_tensors() -> None:
    with pytest.raises(ParameterError, match=r"\['w'\], which 'finish' does not ask for"):
        check_answer(Task.FINISH, "a", Message({}), Message({"task": "finish", "site": "a"}, ANSWER.tensors))


def test_refusing_an_absurd_answer_does_not_repeat_it() -> None:
    assert len(refused(meta={**ANSWER.meta, "site": "x" * 10**5})) < 300
    assert len(refused(meta={**ANSWER.meta, "round": list(range(10**5))})) < 300
    assert "at most 10000000" in refused(meta={**ANSWER.meta, "note": ["x" * 1000] * 10**4})


def test_the_reason_of_a_refusal_reaches_whoever_asked() -> None:
    late = replace(ANSWER, meta={**ANSWER.meta, "site": "b", "round": 1})
    channel = CheckedChannel(Scripted({"a": ANSWER, "b": late}))
    answers = channel.exchange(Task.TRAIN, {"a": REQUEST, "b": REQUEST})
    assert answers == {"a": ANSWER, "b": Failure("is of round 1, expected 2")}


def test_only_sites_that_were_asked_answer_and_silence_is_a_failure() -> None:
    channel = CheckedChannel(Scripted({"a": ANSWER, "stranger": ANSWER}))
    answers = channel.exchange(Task.TRAIN, {"a": REQUEST, "b": REQUEST})
    assert answers == {"a": ANSWER, "b": Failure("no answer")}


def test_nothing_is_kept_of_a_refused_or_late_answer() -> None:
    kept: list[str] = []

    def keep(site: str, answer: Message) -> Message:
        kept.append(site)
        return answer

    engine = Scripted({"a": ANSWER, "b": replace(ANSWER, meta=[])})  # type: ignore[arg-type]
    CheckedChannel(engine).exchange(Task.TRAIN, {"a": REQUEST, "b": REQUEST}, keep)
    with pytest.raises(ParameterError, match="'train' came after the task had ended"):
        engine.keep("a", ANSWER)
    assert kept == ["a"]


def test_a_site_s_own_words_are_one_short_line() -> None:
    channel = CheckedChannel(Scripted({"a": Failure("disk\x1b[31m\nfull " + "x" * 10**6)}))
    answer = channel.exchange(Task.TRAIN, {"a": REQUEST})["a"]
    assert isinstance(answer, Failure)
    assert answer.reason.startswith("disk [31m full xxx")
    assert len(answer.reason) == 301


def update_of(**change: Any) -> Any:
    return read_update(replace(ANSWER, **change), SITE, REQUEST, takes_extras=True)


def test_an_update_has_the_cases_the_site_was_prepared_with() -> None:
    update = update_of(meta={**ANSWER.meta, "num_cases": 10**6})
    assert (update.num_cases, update.num_steps, update.metrics) == (12, 7, {"loss": 0.5})
    assert update.delta is ANSWER.tensors


@pytest.mark.parametrize(
    ("extras", "reason"),
    [
        ({"x": torch.ones(16)}, r"extras have 16 values, more than the 15 that the site received"),
        ({"x": torch.full((3,), 2e6)}, r"extras \['x'\] have values beyond 1e\+06"),
        ({"x": torch.tensor([float("nan")])}, r"not finite: \[x\]"),
        ({"x": torch.ones(3, dtype=torch.int32)}, r"not floating point: \[x torch\.int32\]"),
    ],
)
def test_extras_beyond_what_was_sent_out_are_refused(extras: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(ParameterError, match=f"update of site 'a': .*{reason}"):
        update_of(extras=extras)


def test_extras_are_taken_where_they_are_asked_for() -> None:
    assert update_of(extras={"x": torch.ones(15)}).extras["x"].sum() == 15
    with pytest.raises(ParameterError, match=r"has extras \['x'\], and the algorithm asks for none"):
        read_update(replace(ANSWER, extras={"x": torch.ones(1)}), SITE, REQUEST, takes_extras=False)


@pytest.mark.parametrize("metrics", [{"loss": 1}, {"loss": True}, {"loss": None}, "loss", {"a\nb": 0.5}])
def test_metrics_are_finite_numbers_by_printable_names(metrics: object) -> None:
    with pytest.raises(ParameterError, match=r"update of site 'a': .*metrics"):
        update_of(meta={**ANSWER.meta, "metrics": metrics})


def participant_of(described: int = 4, **change: Any) -> Participant:
    return read_participant("a", "MR", {"num_cases": described}, Message({**PREPARED, **change}))


def test_a_prepared_site_is_what_it_says() -> None:
    assert participant_of() == Participant("a", "MR", ("T1",), 4, {"w": (2, 3)})
    assert participant_of(role="fusion").role == "fusion"


def test_more_training_cases_than_the_fingerprint_has_are_refused() -> None:
    assert participant_of(described=5).num_cases == 4
    with pytest.raises(ParameterError, match="num_cases 4 for training, but its fingerprint is of 3 cases"):
        participant_of(described=3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_cases": 0}, "num_cases 0"),
        ({"num_cases": 10**7}, "num_cases 10000000"),
        ({"num_cases": 2.5}, "num_cases 2.5"),
        ({"channels": ["T1", 2]}, "channels"),
        ({"channels": "T1"}, "channels 'T1'"),
        ({"wire_shapes": [["w", 2]]}, "wire_shapes of type list"),
        ({"wire_shapes": {"w": 6}}, r"wire_shapes of \['w'\]"),
        ({"wire_shapes": {"w": [2, -3]}}, r"wire_shapes of \['w'\]"),
        ({"wire_shapes": {"w": [2, 3.0]}}, r"wire_shapes of \['w'\]"),
        ({"role": "boss"}, "role is 'boss'"),
    ],
)
def test_what_a_site_cannot_be_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ParameterError, match=reason):
        participant_of(**change)


def test_tensors_without_numbers_of_their_own_are_refused() -> None:
    quantized = torch._empty_affine_quantized([2, 3], scale=1.0, zero_point=0, dtype=torch.qint8)
    for tensor in (torch.ones(2, 3).to_sparse(), torch.ones(2, 3, device="meta"), quantized):
        assert refused(tensors={"w": tensor}) == "['w'] are not dense torch tensors"
