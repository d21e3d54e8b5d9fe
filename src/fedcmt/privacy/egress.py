"""What leaves a site: refusal to send personal tensors, and a ledger of everything that was sent."""

import json
import os
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from fedcmt.params import norm, serialized_size
from fedcmt.wire import owner, values


class PersonalTensorError(RuntimeError):
    """A message held a tensor that may not leave the site."""


class EgressLedger:
    """Checks each outgoing message against the site's wire names and appends one JSON line per message that leaves.

    Args:
      path: The ledger, ``egress.jsonl``; kept across restarts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def release(
        self,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, object],
        *,
        allowed: Collection[str],
        task: str,
        round_idx: int | None,
        extras: Mapping[str, Tensor] | None = None,
        personal: Collection[str] = (),
    ) -> None:
        """Record a message that is about to leave.

        Args:
          tensors: Wire name to tensor, as it travels; scales (see `fedcmt.wire`) may leave with their tensor.
          meta: The plain values sent with them; their keys and size are recorded, not their contents.
          allowed: Wire names that may leave this site.
          task: FLARE task the message answers.
          round_idx: 0-based round, None outside rounds.
          extras: Further named tensors the algorithm sends.
          personal: Names of the site's personal parameters; no extra may carry one.

        Raises:
          PersonalTensorError: If a tensor is not among ``allowed``; nothing is sent or recorded then.
        """
        extras = extras or {}
        owners = {owner(name, tensors) for name in tensors}
        forbidden = sorted((owners - set(allowed)) | (set(extras) & set(personal)))
        if forbidden:
            raise PersonalTensorError(
                f"task {task!r}: refused to send {len(forbidden)} tensors that are personal or unknown: "
                f"{forbidden[:4]}. "
                "Only shared and group tensors leave a site; check the algorithm's scopes."
            )
        sent = {**tensors, **_extra(extras)}
        tensor_bytes, framed_bytes = serialized_size(sent) if sent else (0, 0)
        meta_bytes = len(json.dumps(meta))
        row = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "task": task,
            "round": round_idx,
            "bytes": framed_bytes + meta_bytes,
            "tensor_bytes": tensor_bytes,
            "norm": norm(values(tensors) | _extra(extras)),
            "meta_keys": sorted(meta),
            "tensors": {
                n: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for n, t in sent.items()
            },
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as ledger:
            if ledger.tell():
                ledger.seek(-1, os.SEEK_END)
                if ledger.read() != b"\n":  # a kill while a line was written
                    ledger.write(b"\n")
            ledger.write(json.dumps(row).encode() + b"\n")

    def rows(self) -> list[dict]:
        """All recorded messages, oldest first."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


def _extra(extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under names of their own."""
    return {f"extra:{name}": tensor for name, tensor in extras.items()}
