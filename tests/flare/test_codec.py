"""Messages as FLARE Shareables, through FLARE's own serialisation."""

import pytest
import torch
from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.fuel.utils import fobs

from fedcmt.flare.codec import decode, decode_answer, encode, encode_failure, register_tensors
from fedcmt.messages import Failure, Message

META = {"round": 3, "metrics": {"loss": 0.125}, "plans": {"patch": [6, 7, 8], "none": None}, "é": True}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_tensors()


def over_the_wire(shareable: Shareable) -> Shareable:
    return fobs.loads(fobs.dumps(shareable))


@pytest.mark.parametrize("update", [True, False])
def test_a_message_comes_out_as_it_went_in(update: bool) -> None:
    tensors = {
        "encoder.w@mr.t1": torch.arange(6.0).reshape(2, 3),
        "half": torch.tensor([0.5, -2.0]).half(),
        "b": torch.tensor([1.5]).bfloat16(),
        "scalar": torch.tensor(7.0),
        "codes": torch.tensor([[-127, 3]], dtype=torch.int8),
        "codes#scale": torch.tensor([0.5]),
    }
    extras = {"anchor": torch.tensor([[1.0], [2.0]]), "encoder.w@mr.t1": torch.tensor([9.0])}
    got = decode(over_the_wire(encode(Message(META, tensors, extras), update=update)))
    assert got.meta == META
    for sent, received in ((tensors, got.tensors), (extras, got.extras)):
        assert received.keys() == sent.keys()
        assert all(torch.equal(received[n], t) and received[n].dtype == t.dtype for n, t in sent.items())


def test_a_message_of_plain_values_alone_comes_out_too() -> None:
    assert decode(over_the_wire(encode(Message(META), update=False))) == Message(META)


def test_flare_s_filters_see_weights_and_differences() -> None:
    message = Message({}, {"w": torch.ones(2)})
    kinds = [from_shareable(encode(message, update=update)).data_kind for update in (False, True)]
    assert kinds == [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF]


def test_an_answer_is_the_message_in_it() -> None:
    answer = decode_answer(over_the_wire(encode(Message({"round": 1}, {"w": torch.ones(2)}), update=True)))
    assert isinstance(answer, Message)
    assert answer.tensors["w"].tolist() == [1.0, 1.0]


def test_a_failure_keeps_its_reason() -> None:
    assert decode_answer(over_the_wire(encode_failure(Failure("disk full")))) == Failure("disk full")


def test_a_failure_of_flare_s_own_is_named_by_its_code() -> None:
    answer = decode_answer(over_the_wire(make_reply(ReturnCode.TASK_ABORTED)))
    assert answer == Failure("FLARE return code TASK_ABORTED")


def test_a_shareable_without_a_message_is_refused() -> None:
    with pytest.raises(ValueError, match="not a valid DXO"):
        decode(Shareable())
