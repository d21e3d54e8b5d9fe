"""Regions that only evaluation knows: scores of unions of labels, where training and data sets have labels alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedcmt.evaluation.metrics import EvaluationError, label_masks
from fedcmt.settings import is_int

REGIONS_EXPECTED = (
    'an object of region names and label ids, such as {"tumor_core": [1, 3]}: whole numbers above 0, at least one per '
    'region, each once, and no region called "background" or "ignore"'
)
_OTHER_MEANING = ("background", "ignore")


def is_regions(value: object) -> bool:
    """Whether a JSON value names regions, as `REGIONS_EXPECTED` says; an empty object does."""
    return isinstance(value, Mapping) and all(_is_name(name) and _is_union(ids) for name, ids in value.items())


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name.strip() != "" and name not in _OTHER_MEANING


def _is_union(ids: object) -> bool:
    return isinstance(ids, list) and ids != [] and all(is_int(i) and i > 0 for i in ids) and len(set(ids)) == len(ids)


def with_score_regions(
    dataset_json: Mapping[str, Any], regions: Mapping[str, Sequence[int]], where: str
) -> dict[str, Any]:
    """A dataset.json by which label maps are scored: with regions in place of its labels.

    Args:
      dataset_json: nnU-Net's; its background and ignore label stay.
      regions: Region name -> label ids, ``score_regions`` of a site; empty leaves all as it is.
      where: Whose they are, for messages.

    Raises:
      EvaluationError: If the data set has regions of its own, or no label of one of the ids.
    """
    if not regions:
        return dict(dataset_json)
    labels = dataset_json["labels"]
    if own := [name for name, value in labels.items() if isinstance(value, list | tuple)]:
        raise EvaluationError(
            f"{where}: score_regions is {dict(regions)}, but dataset.json has regions already ({', '.join(own)}). "
            "These are scored; leave score_regions out."
        )
    known = sorted(value for values in label_masks(dataset_json).values() for value in values)
    for name, ids in regions.items():
        if absent := sorted(set(ids) - set(known)):
            raise EvaluationError(
                f"{where}: score_regions: {name!r} is {list(ids)}, but dataset.json has no label of {absent}; its "
                f"label ids are {known}. Correct score_regions."
            )
    kept = {name: labels[name] for name in _OTHER_MEANING if name in labels}
    return {**dataset_json, "labels": {**kept, **{name: list(ids) for name, ids in regions.items()}}}
