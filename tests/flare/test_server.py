"""The controller: what it refuses before it asks a site for anything."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
from nvflare.apis.fl_constant import FLContextKey

from fedcmt.algorithms.base import Algorithm
from fedcmt.algorithms.fedavg import FedAvg
from fedcmt.algorithms.fedmepd import FedMEPD
from fedcmt.flare.server import FederatedRounds
from fedcmt.workspace import WORKSPACE_VARIABLE, environment


def panic(algorithm: Algorithm, planning: dict, workspace: Path, name: str = "by_hand") -> str:
    """Why the controller ends a job that nobody has looked at before it came."""
    context = MagicMock()
    context.get_engine().get_component.return_value = algorithm
    context.get_prop.side_effect = {FLContextKey.JOB_META: {"name": name}}.get
    rounds = FederatedRounds(2, planning)
    with (
        environment({WORKSPACE_VARIABLE: str(workspace)}),
        patch.object(rounds, "system_panic") as ended,
        patch.object(rounds, "log_error"),
        patch.object(rounds, "send") as sent,
        patch("fedcmt.flare.server.log_for_launcher"),
    ):
        rounds.start_controller(context)
        rounds.control_flow(MagicMock(triggered=False), context)
    sent.assert_not_called()
    (reason, _), _ = ended.call_args
    assert (workspace / "server" / "failure.txt").read_text() == reason
    return reason


def test_a_job_that_flare_ends_leaves_no_reason_as_if_it_were_the_server_s(tmp_path: Path) -> None:
    context = MagicMock()
    context.get_engine().get_component.return_value = FedAvg()
    context.get_engine().get_clients.return_value = [SimpleNamespace(name="client1")]
    context.get_prop.side_effect = {FLContextKey.JOB_META: {"name": "by_hand"}}.get
    rounds = FederatedRounds(2)
    with (
        environment({WORKSPACE_VARIABLE: str(tmp_path)}),
        patch.object(rounds, "system_panic") as ended,
        patch.object(rounds, "log_error"),
        patch.object(rounds, "send"),
        patch("fedcmt.flare.server.log_for_launcher"),
    ):
        rounds.start_controller(context)
        rounds.control_flow(MagicMock(triggered=True), context)
    (reason, _), _ = ended.call_args
    assert reason.endswith("the job was aborted")
    assert not (tmp_path / "server" / "failure.txt").exists()


@pytest.mark.parametrize(
    ("algorithm", "planning", "reason"),
    [
        (
            FedMEPD(anchors_per_class=2),
            {"network": "FedMEPDNet"},
            "anchors_per_class is 2 and server.planning.network_options.anchors_per_class 4",
        ),
        (FedAvg(), {"network": "FedMEPDNet"}, "calibrated by anchors, and FedAvg brings none"),
        (FedAvg(), {"mode": "own"}, "FedAvg averages tensors by name alone"),
    ],
)
def test_a_job_whose_parts_do_not_fit_is_refused_also_if_it_was_submitted_by_hand(
    algorithm: Algorithm, planning: dict, reason: str, tmp_path: Path
) -> None:
    said = panic(algorithm, planning, tmp_path)
    assert said.startswith("job 'by_hand': ")
    assert reason in said


def test_a_job_s_name_that_leads_out_of_sites_folders_is_refused_before_any_site_is_asked(tmp_path: Path) -> None:
    said = panic(FedAvg(), {}, tmp_path, name="../evil")
    assert said.startswith("the submitted meta.json: name is '../evil', expected the job's name")
