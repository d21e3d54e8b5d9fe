"""Sites that come up at the same moment are each told their own name."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.private.fed.app.simulator import simulator_runner

from fedcmt.flare.simulator_process import SitesRunner


class Meeting:
    """Deploy arguments whose copy, made between the writing of a name and its sending, waits for the other site's."""

    def __init__(self, workspace: str, barrier: threading.Barrier) -> None:
        self.workspace, self.barrier = workspace, barrier

    def __deepcopy__(self, memo: dict[int, Any]) -> SimpleNamespace:
        self.barrier.wait(timeout=10)
        return SimpleNamespace(workspace=self.workspace)


class Connection:
    """To a site's process that ends the run at once; keeps the name that was sent."""

    def __init__(self) -> None:
        self.told: str | None = None

    def send(self, data: Any) -> None:
        if isinstance(data, dict):
            self.told = data["build_ctx"]["client_name"]

    def recv(self) -> bool:
        return True


def test_sites_that_come_up_together_are_told_their_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = SimpleNamespace(poll=lambda: None, terminate=lambda: None, wait=lambda timeout: 0)
    monkeypatch.setattr(simulator_runner.subprocess, "Popen", lambda *args, **options: running)
    connections: dict[str, Connection] = {}

    class Runner(SitesRunner):
        def _create_connection(self, open_port: int, timeout: float = 60.0) -> Connection:
            name = threading.current_thread().name
            return connections.setdefault(name, Connection())

    cell = SimpleNamespace(get_root_url_for_child=lambda: "tcp://r", get_internal_listener_url=lambda: "tcp://p")
    sites = [SimpleNamespace(client_name=name, token="t", cell=cell) for name in ("north", "south")]
    arguments = SimpleNamespace(workspace=str(tmp_path), log_config="concise", set=None)
    for site in sites:
        for folder in ("startup", "local"):
            (tmp_path / site.client_name / folder).mkdir(parents=True)
    deploy = Meeting(str(tmp_path), threading.Barrier(len(sites)))
    runner = Runner("/none", arguments, sites, None, deploy, {"client_name": "last"})

    def bring_up(site: SimpleNamespace) -> None:
        threading.current_thread().name = site.client_name
        runner.do_one_task(site, len(sites), None, threading.Lock())

    with ThreadPoolExecutor(len(sites)) as threads:
        list(threads.map(bring_up, sites))
    assert {name: connection.told for name, connection in connections.items()} == {"north": "north", "south": "south"}
