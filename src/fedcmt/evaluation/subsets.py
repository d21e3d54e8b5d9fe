"""Subsets of the sequences that a model was trained on: which are meant, which there are, and scores of each.

Order and names are those of `fedcmt.models.sequences`, whatever the order and the spelling of a model's channels.
"""

import csv
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from fedcmt.data.checks import channel_names
from fedcmt.evaluation.metrics import FolderScores
from fedcmt.models.sequences import SEQUENCES, canonical

Subset = tuple[str, ...]
"""Sequences in the canonical order."""

AS_CSV, AS_MARKDOWN = "subsets.csv", "subsets.md"
"""File names of the table."""

_THERE, _MISSING = "●", "○"


class SubsetError(ValueError):
    """Sequences that a model does not have."""


def sequences_of(dataset_json: Mapping) -> tuple[str, ...]:
    """What each channel of a model is, in the order of its channels.

    Args:
      dataset_json: The model's.

    Raises:
      SubsetError: If a channel is no known MR sequence, or two are the same one.
    """
    try:
        return canonical(channel_names(dataset_json))
    except ValueError as error:
        raise SubsetError(f"the model's {error}") from error


def chosen_sequences(dataset_json: Mapping, names: Sequence[str]) -> Subset:
    """The sequences that are meant by these names.

    Args:
      dataset_json: The model's.
      names: In any order, under any name that `canonical` knows.

    Raises:
      SubsetError: If there is none, one that the model lacks or one twice; or as in `sequences_of`.
    """
    own = sequences_of(dataset_json)
    try:
        chosen = canonical(names)
    except ValueError:
        chosen = ()
    if not chosen or set(chosen) - set(own):
        raise SubsetError(
            f"channels {list(names)}, expected one or more of the model's {list(channel_names(dataset_json))}, each "
            "once, by these names or other usual ones."
        )
    return tuple(sequence for sequence in SEQUENCES if sequence in chosen)


def subsets_of(sequences: Sequence[str]) -> list[Subset]:
    """Every subset but the empty one, the small ones first.

    Args:
      sequences: Canonical names, in any order.
    """
    ordered = [sequence for sequence in SEQUENCES if sequence in sequences]
    return [subset for size in range(1, len(ordered) + 1) for subset in combinations(ordered, size)]


def folder_name(images: str, subset: Subset) -> str:
    """Where label maps from a subset are, as ``imagesTs-FLAIR+T2``.

    Args:
      images: Name of the folder of images.
      subset: The sequences they were made from.
    """
    return f"{images}-{'+'.join(subset)}"


def write_subsets(scores: Mapping[Subset, FolderScores], folder: Path) -> None:
    """Write mean Dice per subset: a row for each, a column for each sequence, each label or region and their mean.

    ``subsets.csv`` has 1 for a sequence that is in the subset and 0 for one that is not, and Dice in full;
    ``subsets.md`` has a filled and an empty mark, and four decimals.

    Args:
      scores: By subset, in the order of the rows; all of the same labels and cases.
      folder: Where; it exists.
    """
    first = next(iter(scores.values()))
    sequences = [sequence for sequence in SEQUENCES if any(sequence in subset for subset in scores)]
    labels = list(first.means["dice"])
    rows = [[*(s in subset for s in sequences), *_dice(own, labels)] for subset, own in scores.items()]
    as_csv, as_markdown = (folder / f".{name}.partial" for name in (AS_CSV, AS_MARKDOWN))
    with as_csv.open("w", newline="") as file:
        csv.writer(file).writerows([[*sequences, *labels, "mean_dice"], *([_plain(v) for v in row] for row in rows)])
    lines = [[*sequences, *labels, "mean"], *([_shown(value) for value in row] for row in rows)]
    cases = "1 case" if first.cases == 1 else f"{first.cases} cases"
    as_markdown.write_text(
        f"Mean Dice of {cases}, by the sequences that the model was given ({_THERE}).\n\n"
        f"{_markdown(lines, len(sequences))}\n",
        encoding="utf-8",
    )
    as_csv.replace(folder / AS_CSV)
    as_markdown.replace(folder / AS_MARKDOWN)


def _dice(scores: FolderScores, labels: Sequence[str]) -> list[float]:
    return [*(scores.means["dice"][label] for label in labels), scores.mean_dice]


def _plain(value: bool | float) -> int | float:
    return int(value) if isinstance(value, bool) else value


def _shown(value: bool | float) -> str:
    if isinstance(value, bool):
        return _THERE if value else _MISSING
    return f"{value:.4f}"


def _markdown(lines: Sequence[Sequence[str]], centred: int) -> str:
    """A table whose cells are padded, so that a terminal shows it aligned too; the first columns are centred."""
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]
    rule = [f":{'-' * (w - 2)}:" if i < centred else f"{'-' * (w - 1)}:" for i, w in enumerate(widths)]
    head, *rows = (
        [cell.center(w) if i < centred else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))
