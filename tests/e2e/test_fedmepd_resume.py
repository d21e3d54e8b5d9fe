"""FedMEPD killed at any turn and resumed: server and sites end with the numbers of a run that was never killed."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcmt.inprocess
import fedcmt.server_state
from fedcmt.messages import Message, Task
from fedcmt.params import Params, load_tensors, save_tensors
from fedcmt.site import Site
from tests.e2e.test_fedmepd_job import SITES, Runs

KEPT, REPORTED = "before the server keeps the round", "after the server has kept the round"


class Killed(BaseException):
    """Ends the process' work wherever it is, as nothing that handles errors would."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("fedmepd"))
    made.run("whole")
    return made


@contextlib.contextmanager
def killing(where: str, round_idx: int) -> Iterator[None]:
    """In here a run is killed in a round: after the first training step of a site, or at the server."""
    handle, report = Site.handle, fedcmt.inprocess._report

    def killed() -> bool:
        raise Killed

    def train(site: Site, task: Task, message: Message, stop: Callable[[], bool] = lambda: False) -> Message:
        chosen = task is Task.TRAIN and (site.name, message.meta["round"]) == (where, round_idx)
        return handle(site, task, message, killed if chosen else stop)

    def keep(path: Path, tensors: Params, meta: dict[str, Any], **options: Any) -> None:
        if (where, path.name, meta.get("round")) == (KEPT, "state.safetensors", round_idx):
            raise Killed
        save_tensors(path, tensors, meta, **options)

    def tell(writer: Any, reported: int, curves: Any) -> None:
        if (where, reported) == (REPORTED, round_idx):
            raise Killed
        report(writer, reported, curves)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Site, "handle", train)
        patch.setattr(fedcmt.server_state, "save_tensors", keep)
        patch.setattr(fedcmt.inprocess, "_report", tell)
        yield


def files(runs: Runs, name: str) -> dict[str, tuple[Params, dict]]:
    """State of the server and of every site."""
    paths = {"server": runs.root / name / "server" / "state.safetensors"}
    paths |= {site: runs.root / name / "sites" / site / "last.safetensors" for site in SITES}
    return {owner: load_tensors(path) for owner, path in paths.items()}


@pytest.mark.parametrize(
    "kills",
    [
        [("single", 1)],
        [("fusion", 2)],
        [(KEPT, 1)],
        [(REPORTED, 1)],
        [("fusion", 1), ("fusion", 1), ("pair", 2), (KEPT, 2)],
    ],
    ids=[
        "in the sites' turn, where one has finished",
        "in the fusion site's turn",
        KEPT,
        "between rounds",
        "four times",
    ],
)
def test_oracle_26_a_run_that_is_killed_and_resumed_ends_as_one_that_is_not(
    runs: Runs, kills: list[tuple[str, int]], request: pytest.FixtureRequest
) -> None:
    name = "killed_" + re.sub(r"\W+", "_", request.node.callspec.id)
    for number, (where, round_idx) in enumerate(kills):
        with killing(where, round_idx), pytest.raises(Killed):
            runs.run(name, resume=number > 0)
    runs.run(name, resume=True)
    whole, resumed = files(runs, "whole"), files(runs, name)
    for owner, (tensors, meta) in whole.items():
        own, own_meta = resumed[owner]
        assert own.keys() == tensors.keys()
        assert [key for key in tensors if not torch.equal(own[key], tensors[key])] == []
        names = ("job", "federation") if owner == "server" else ("federation",)
        assert own_meta == {**meta, **{name: own_meta[name] for name in names}}


def test_what_is_compared_holds_masks_weights_anchors_and_networks(runs: Runs) -> None:
    state = files(runs, "whole")["server"][0]
    patience = torch.cat([t for name, t in state.items() if name.startswith("memory/patience/")])
    weights = torch.cat([t for name, t in state.items() if name.startswith("memory/weight/")])
    assert 0 < int((patience == 0).sum()) < len(patience)
    assert len(weights.unique()) > 2
    assert state["memory/anchors.1"].abs().sum() > 0
    assert any(name.startswith("params/encoders.T1.") for name in state)
