"""The four MR sequences of brain tumour data, by one name each, and the other names that data sets give them."""

import re
from collections.abc import Mapping, Sequence

SEQUENCES = ("FLAIR", "T1ce", "T1", "T2")
"""The names, in the order in which networks stack them."""

_ALIASES: Mapping[str, tuple[str, ...]] = {
    "FLAIR": ("flair", "t2flair", "t2f"),
    "T1ce": ("t1ce", "t1c", "t1gd"),
    "T1": ("t1", "t1w", "t1n"),
    "T2": ("t2", "t2w"),
}
_KNOWN = {alias: sequence for sequence, aliases in _ALIASES.items() for alias in aliases}


def canonical(names: Sequence[str]) -> tuple[str, ...]:
    """The sequences that a site's channels are, in the channels' own order.

    Capitals, blanks, hyphens and underscores do not count.

    Args:
      names: Channel names of dataset.json, in its order.

    Raises:
      ValueError: If a name is not known, or two are the same sequence.
    """
    found = [_KNOWN.get(re.sub(r"[\s_-]", "", name).lower()) for name in names]
    unknown = [name for name, sequence in zip(names, found, strict=True) if sequence is None]
    if unknown:
        listed = "; ".join(f"{sequence} ({', '.join(aliases)})" for sequence, aliases in _ALIASES.items())
        raise ValueError(
            f"channels {list(names)}: {unknown} are no known MR sequences, expected {listed}. Rename them in "
            "channel_names of dataset.json."
        )
    sequences = tuple(sequence for sequence in found if sequence is not None)
    twice = [name for name, sequence in zip(names, sequences, strict=True) if sequences.count(sequence) > 1]
    if twice:
        raise ValueError(
            f"channels {list(names)}: {twice} name one sequence twice. Give each sequence one channel in dataset.json."
        )
    return sequences
