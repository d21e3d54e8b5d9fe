"""A builder for FLARE's provisioning: what each startup kit of ours needs beyond FLARE's own, in its ``local/`` folder.

A project names it after FLARE's builders: ``path: fedcmt.flare.provision.KitRules``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvflare.lighter.constants import ProvFileName
from nvflare.lighter.spec import Builder, Project, ProvisionContext

from fedcmt.flare.components import allowed_classes
from fedcmt.json_file import read_json, write_json

_NO_RIGHT = ("byoc", "shell_commands")
"""Code that travels inside a job; an administrator's shell at a site."""
_COMMUNICATION_SECONDS = 1800.0
"""For one message; FLARE's 300 are short for a payload of a gigabyte on a hospital's line."""
_RIGHTS = ("submit_job", "clone_job", "manage_job", "download_job", "view", "operate")


class KitRules(Builder):
    """Lets the installed package run, and nothing that comes with a job.

    Extends FLARE's ``class_allow_list`` by our algorithms and the two ends of FLARE, takes from every role the rights
    to send code and to open a shell at a site, keeps logs at the sites, and moves the server's storage out of ``/tmp``.

    Args:
      storage: Absolute folder on the server where it keeps jobs and their results; None leaves it to FLARE, whose POC
        sets one.
    """

    def __init__(self, storage: str | None = None) -> None:
        super().__init__()
        if storage is not None and not Path(storage).is_absolute():
            raise ValueError(f"KitRules: storage is {storage!r}, expected an absolute folder on the server")
        self._storage = storage

    def build(self, project: Project, ctx: ProvisionContext) -> None:
        """Edit the files that FLARE's StaticFileBuilder has written."""
        for participant in (project.get_server(), *project.get_clients()):
            local = Path(ctx.get_local_dir(participant))
            _edit(local / ProvFileName.RESOURCES_JSON_DEFAULT, self._set_resources)
            _edit(local / ProvFileName.AUTHORIZATION_JSON_DEFAULT, _take_rights)

    def _set_resources(self, resources: dict[str, Any]) -> None:
        resources["class_allow_list"] = allowed_classes()
        if "client" in resources:
            resources["client"]["communication_timeout"] = _COMMUNICATION_SECONDS
            resources["allow_log_streaming"] = False
            resources["components"] = [c for c in resources["components"] if c["id"] != "site_log_streamer"]
        elif self._storage is not None:
            resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = f"{self._storage}/snapshots"
            (manager,) = (c for c in resources["components"] if c["id"] == "job_manager")
            manager["args"]["uri_root"] = f"{self._storage}/jobs"


def _take_rights(authorization: dict[str, Any]) -> None:
    for role, rights in authorization["permissions"].items():
        given = dict.fromkeys(_RIGHTS, rights) if isinstance(rights, str) else rights
        authorization["permissions"][role] = {**given, **dict.fromkeys(_NO_RIGHT, "none")}


def _edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = read_json(file)
    change(content)
    write_json(file, content, indent=2)
