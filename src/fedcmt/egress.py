"""Show what left a site: ``python -m fedcmt.egress workspace/brats_sdl/sites/client1/egress.jsonl``.

The ledger is `fedcmt.privacy.egress.EgressLedger`'s. It holds names, shapes, types, bytes and norms, no values.
"""

import argparse
import json
import math
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from fedcmt.arguments import whole_number
from fedcmt.settings import is_int

_EXAMPLE = """example:
  python -m fedcmt.egress workspace/brats_sdl/sites/client1/egress.jsonl --round 0 --tensors"""
_PREFIX_PARTS = 3


class EgressLogError(ValueError):
    """A file that is no egress ledger; the message names it."""


@dataclass(frozen=True)
class SentTensor:
    """One tensor of a message.

    Attributes:
      name: Wire name; of an algorithm's further tensors with "extra:" before it.
      shape: Its shape.
      dtype: E.g. "float32".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def group(self) -> str:
        """The first parts of its name, and whose copy it is: "encoder.stages.0.* @mr.t1"."""
        path, at, copy = self.name.partition("@")
        parts = path.split(".")
        prefix = ".".join(parts[: min(_PREFIX_PARTS, len(parts) - 1)])
        return (f"{prefix}.*" if prefix else path) + (f" @{copy}" if at else "")


@dataclass(frozen=True)
class SentMessage:
    """One line of the ledger."""

    task: str
    round_idx: int | None
    size_bytes: int
    norm: float
    meta_keys: tuple[str, ...]
    tensors: tuple[SentTensor, ...]

    @classmethod
    def from_line(cls, line: str) -> Self:
        """Read one line.

        Raises:
          ValueError: If it is not one of the ledger's.
        """
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("not an object")
        try:
            tensors = tuple(
                SentTensor(name, tuple(tensor["shape"]), tensor["dtype"]) for name, tensor in row["tensors"].items()
            )
            keys = tuple(row["meta_keys"])
            message = cls(row["task"], row["round"], row["bytes"], float(row["norm"]), keys, tensors)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a row of an egress ledger ({error!r})") from error
        texts = [message.task, *message.meta_keys, *(text for t in tensors for text in (t.name, t.dtype))]
        sizes = [message.size_bytes, *(size for tensor in tensors for size in tensor.shape)]
        round_ok = message.round_idx is None or is_int(message.round_idx)
        if not (round_ok and all(map(is_int, sizes)) and all(map(_is_printable, texts))):
            raise ValueError("not a row of an egress ledger (values of other types)")
        return message


@dataclass(frozen=True)
class TaskRow:
    """What one task of one round sent.

    Attributes:
      task: The server's task that was answered.
      round_idx: 0-based; None outside rounds.
      messages: More than one after a restart.
      size_bytes: Of all messages.
      norm: The largest message's.
      tensors: Distinct names.
      meta_keys: Of the plain values sent along.
    """

    task: str
    round_idx: int | None
    messages: int
    size_bytes: int
    norm: float
    tensors: int
    meta_keys: tuple[str, ...]


@dataclass(frozen=True)
class GroupRow:
    """Tensors whose names begin alike, each shape of a name counted once."""

    group: str
    tensors: int
    numbers: int
    dtypes: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        messages, broken = read_log(options.log)
    except (EgressLogError, OSError) as error:
        print(f"fedcmt.egress: {error}", file=sys.stderr)
        return 1
    if options.round is not None:
        messages = [message for message in messages if message.round_idx == options.round]
    if options.json:
        print(json.dumps(_as_json(messages, broken, options.tensors), indent=2))
    else:
        print("\n".join(_as_text(messages, broken, options.tensors)))
    return 0


def read_log(path: Path) -> tuple[list[SentMessage], list[int]]:
    """The messages, oldest first, and the 1-based numbers of lines that cannot be read.

    The last line is cut off where the process was killed while it wrote. An empty file is a ledger of no messages.

    Raises:
      EgressLogError: If there is no such file, or it holds lines and none of a ledger.
    """
    if not path.is_file():
        raise EgressLogError(f"{path}: no such file; a site's ledger is WORKSPACE/sites/SITE/egress.jsonl")
    messages, broken = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            messages.append(SentMessage.from_line(line))
        except ValueError:
            broken.append(number)
    if broken and not messages:
        raise EgressLogError(f"{path}: none of {len(broken)} lines is of an egress ledger; expected egress.jsonl")
    return messages, broken


def by_task(messages: Iterable[SentMessage]) -> list[TaskRow]:
    """A row per task and round, in the order they were first sent."""
    groups: dict[tuple[str, int | None], list[SentMessage]] = {}
    for message in messages:
        groups.setdefault((message.task, message.round_idx), []).append(message)
    return [
        TaskRow(
            task=task,
            round_idx=round_idx,
            messages=len(sent),
            size_bytes=sum(message.size_bytes for message in sent),
            norm=max(message.norm for message in sent),
            tensors=len({tensor.name for message in sent for tensor in message.tensors}),
            meta_keys=tuple(sorted({key for message in sent for key in message.meta_keys})),
        )
        for (task, round_idx), sent in groups.items()
    ]


def distinct_tensors(messages: Iterable[SentMessage]) -> list[SentTensor]:
    """Every tensor that left, once per name, shape and type, by name."""
    return sorted({tensor for message in messages for tensor in message.tensors}, key=lambda t: (t.name, t.shape))


def by_group(tensors: Iterable[SentTensor]) -> list[GroupRow]:
    """A row per group of tensor names, by name."""
    groups: dict[str, list[SentTensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.group, []).append(tensor)
    return [
        GroupRow(
            group=group,
            tensors=len({tensor.name for tensor in held}),
            numbers=sum(math.prod(tensor.shape) for tensor in held),
            dtypes=tuple(sorted({tensor.dtype for tensor in held})),
        )
        for group, held in sorted(groups.items())
    ]


def _is_printable(text: object) -> bool:
    """Text that does no more to a terminal than appear on it."""
    return isinstance(text, str) and text.isprintable()


def _as_text(messages: Sequence[SentMessage], broken: Sequence[int], with_tensors: bool) -> list[str]:
    lines = [*_table(messages), "", *_groups(messages)] if messages else ["No message."]
    if with_tensors and messages:
        tensors = distinct_tensors(messages)
        lines += [
            "",
            "Tensors",
            *(f"  {t.name}  {'x'.join(map(str, t.shape)) or 'one number'} {t.dtype}" for t in tensors),
        ]
    if broken:
        numbers = ", ".join(map(str, broken))
        lines += ["", f"Not shown: line {numbers}, which cannot be read (cut off if the process was killed there)."]
    return lines


def _table(messages: Sequence[SentMessage]) -> list[str]:
    head = f"{'task':<12} {'round':>5} {'messages':>8} {'bytes':>14} {'norm':>10} {'tensors':>7}  plain values"
    lines = [head]
    for row in by_task(messages):
        round_idx = "" if row.round_idx is None else str(row.round_idx)
        lines.append(
            f"{row.task:<12} {round_idx:>5} {row.messages:>8} {row.size_bytes:>14,} {row.norm:>10.4g} "
            f"{row.tensors:>7}  {', '.join(row.meta_keys)}"
        )
    total = sum(message.size_bytes for message in messages)
    return [*lines, f"{'all':<12} {'':>5} {len(messages):>8} {total:>14,}"]


def _groups(messages: Sequence[SentMessage]) -> list[str]:
    rows = by_group(distinct_tensors(messages))
    if not rows:
        return ["No tensor has left."]
    width = max(len(row.group) for row in rows)
    lines = [
        f"{row.group:<{width}} {row.tensors:>7} {row.numbers:>13,}  {', '.join(row.dtypes)}".rstrip() for row in rows
    ]
    return [f"{'names':<{width}} {'tensors':>7} {'numbers':>13}  type", *lines]


def _as_json(messages: Sequence[SentMessage], broken: Sequence[int], with_tensors: bool) -> dict[str, Any]:
    tensors = distinct_tensors(messages)
    return {
        "tasks": [asdict(row) for row in by_task(messages)],
        "messages": len(messages),
        "size_bytes": sum(message.size_bytes for message in messages),
        "groups": [asdict(row) for row in by_group(tensors)],
        **({"tensors": [asdict(tensor) for tensor in tensors]} if with_tensors else {}),
        "unreadable_lines": list(broken),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fedcmt.egress",
        description="Show what left a site, from its ledger.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("log", type=Path, metavar="LOG", help="the site's egress.jsonl")
    parser.add_argument("--round", type=whole_number(0), metavar="N", help="only this round, 0-based as in the ledger")
    parser.add_argument("--tensors", action="store_true", help="every tensor with shape and type")
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends it without a traceback
    sys.exit(main())
