"""FedMEPD at a site: anchors come in where features are calibrated, and go out where there is all data.

The fusion site's network is not calibrated. While it trains it takes prototypes of the cases it draws, and after the
round it sends the anchors made of them; which case is in which cluster stays there. See `fedcmt.algorithms.fedmepd`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fedcmt.algorithms.anchors import (
    Anchors,
    CasePrototypes,
    case_prototypes,
    first_anchors,
    mean_prototypes,
    updated_anchors,
)
from fedcmt.algorithms.base import Algorithm, LocalStep
from fedcmt.params import ParameterError, Params, copy_into

_PREFIX = "anchors."


class AnchorSite(Algorithm):
    """The site's half of `fedcmt.algorithms.fedmepd.FedMEPD`.

    Args:
      anchors_per_class: As the network has them (``planning.network_options.anchors_per_class``).
      send_anchors: Whether a site without calibration makes anchors.
    """

    def __init__(self, anchors_per_class: int, send_anchors: bool) -> None:
        self.anchors_per_class = anchors_per_class
        self._send_anchors = send_anchors
        self._anchors: Anchors | None = None
        self._seen: dict[str, list[CasePrototypes]] = {}

    def local_start(self, network: nn.Module, extras: Mapping[str, Tensor]) -> None:
        """Put the anchors that came into the network, if it has a place for them.

        Raises:
          ParameterError: If their number or width is another than the network's, or none came: attention to no anchor
            gives constant features.
        """
        self._seen = {}
        if own := _anchor_names(network):
            given = {name: tensor for name, tensor in extras.items() if name in own}
            if missing := sorted(own - set(given)):
                raise ParameterError(
                    f"FedMEPD: this site's network is calibrated, and the server sent no {missing}. Leave "
                    "algorithm.anchors on, or set planning.network_options.calibrated to false"
                )
            copy_into(network, given, where="anchors from the fusion site")

    def local_loss(self, loss: Tensor, step: LocalStep) -> Tensor:
        """The loss as it is; on the way, prototypes of the batch's cases where features are not calibrated."""
        if self._send_anchors and not _anchor_names(step.network):
            drawn = case_prototypes(step.output.features, step.target, step.logits.shape[1])
            for case, prototypes in zip(step.cases, drawn, strict=True):
                self._seen.setdefault(case, []).append(prototypes)
        return loss

    def local_extras(self, network: nn.Module) -> Params:
        """The anchors after this round, from the site that makes them."""
        if not self._seen:
            return {}
        prototypes = {case: mean_prototypes(draws) for case, draws in sorted(self._seen.items())}
        if self._anchors is None:
            self._anchors = first_anchors(prototypes, self.anchors_per_class)
        else:
            self._anchors = updated_anchors(self._anchors, prototypes)
        return {name: tensor.clone() for name, tensor in self._anchors.tensors().items()}

    def local_state(self) -> tuple[Params, dict[str, Any]]:
        """Anchors and clusters; the latter hold case ids and stay in the site's own file."""
        return ({}, {}) if self._anchors is None else (self._anchors.tensors(), self._anchors.record())

    def restore_local(self, tensors: Params, plain: Mapping[str, Any]) -> None:
        """Back to the anchors of the round before."""
        self._seen = {}
        self._anchors = Anchors.restored(tensors, plain) if tensors else None


def _anchor_names(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_parameters() if name.startswith(_PREFIX)}
