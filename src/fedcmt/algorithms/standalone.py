"""Standalone: every site trains alone, for comparison. Nothing is shared, and only metrics leave a site."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from fedcmt.algorithms.base import Algorithm, State, Update
from fedcmt.models.scopes import ALL_PERSONAL


class Standalone(Algorithm):
    """A site ends with its own model after as many steps as a federation would have taken."""

    scopes = ALL_PERSONAL
    product: ClassVar[Literal["received", "trained"]] = "trained"

    def aggregate(self, state: State, updates: Mapping[str, Update]) -> State:
        """There is nothing to combine."""
        return state
