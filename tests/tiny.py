"""A site on a tiny data set, and the conversation that makes it ready: what tests of whole sites share."""

from collections.abc import Mapping
from typing import Any, Protocol

from fedcmt.algorithms.base import Algorithm
from fedcmt.messages import Failure, Message, Task
from fedcmt.nnunet.planner import FederatedPlanner
from fedcmt.params import Params

DATASET_ID = 701
DATASET = f"Dataset{DATASET_ID}_Tiny"
"""Five training cases and a test case of FLAIR and T2, 24 x 28 x 20 voxels; the fixture `tiny_raw` makes it."""
PLANNING: dict[str, Any] = {
    "mode": "architecture",
    "base_features": 4,
    "max_features": 8,
    "max_stages": 3,
    "max_patch_size": [16, 16, 24],
    "batch_size": 2,
    "extra_stem_convolution": True,
}


class HandlesTasks(Protocol):
    """A `fedcmt.site.Site`, or one in a process of its own."""

    def handle(self, task: Task, message: Message) -> Message | Failure: ...


def first_payload(
    site: HandlesTasks,
    algorithm: Algorithm,
    *,
    name: str = "north",
    planning: Mapping[str, Any] = PLANNING,
    privacy: Mapping[str, Any] | None = None,
    num_sites: int = 2,
    num_rounds: int = 2,
    schedule_rounds: int | None = None,
    resume: bool = False,
) -> Params:
    """Make a site ready to train, as a server does; returns what it would receive in round 0."""
    planner = FederatedPlanner(dict(planning), seed=5)
    introduction = {"job": "job", "seed": 5, "planning": dict(planning), "privacy": dict(privacy or {})}
    answer = site.handle(Task.FINGERPRINT, Message({**introduction, "num_sites": num_sites, "federation": "f0"}))
    assert isinstance(answer, Message)
    fingerprints = {name: answer.meta["fingerprint"]}
    plans = planner.plan(fingerprints, {})
    rounds = {"num_rounds": num_rounds, "schedule_rounds": schedule_rounds or num_rounds, "resume": resume}
    ready = site.handle(Task.PREPARE, Message({"plans": plans[name], **rounds}))
    assert isinstance(ready, Message)
    initial = planner.initial(plans, fingerprints, {name: answer.meta["modality"]}, algorithm.scopes)
    return {key: initial[key] for key in ready.meta["wire_shapes"]}
