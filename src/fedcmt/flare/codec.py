"""Our messages as FLARE Shareables: tensors in a DXO (so FLARE's own filters see them), plain values in its meta."""

import json

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs

from fedcmt.messages import Failure, Message

_META = "fedcmt_meta"
_ERROR = "fedcmt_error"
_EXTRA = "extra:"


def register_tensors() -> None:
    """Let torch tensors cross the wire as safetensors; each process needs it once."""
    fobs.register(TensorDecomposer)


def encode(message: Message, *, update: bool) -> Shareable:
    """A request (weights) or an answer (weight differences)."""
    data = {**message.tensors, **{_EXTRA + name: tensor for name, tensor in message.extras.items()}}
    kind = DataKind.WEIGHT_DIFF if update else DataKind.WEIGHTS
    return DXO(kind, data=data, meta={_META: json.dumps(message.meta)}).to_shareable()


def decode(shareable: Shareable) -> Message:
    """The message in a Shareable; raises ValueError if there is none."""
    dxo = from_shareable(shareable)
    if _META not in dxo.meta:
        raise ValueError(f"not one of our messages: a {dxo.data_kind} DXO with meta {sorted(dxo.meta)}")
    return Message(
        meta=json.loads(dxo.meta[_META]),
        tensors={name: tensor for name, tensor in dxo.data.items() if not name.startswith(_EXTRA)},
        extras={name.removeprefix(_EXTRA): tensor for name, tensor in dxo.data.items() if name.startswith(_EXTRA)},
    )


def encode_failure(failure: Failure) -> Shareable:
    """The answer of a site that could not do its task."""
    return make_reply(ReturnCode.EXECUTION_EXCEPTION, headers={_ERROR: failure.reason})


def decode_answer(shareable: Shareable) -> Message | Failure:
    """The answer in a result, whatever its return code."""
    code = shareable.get_return_code()
    if code != ReturnCode.OK:
        return Failure(shareable.get_header(_ERROR) or f"FLARE return code {code}")
    return decode(shareable)
