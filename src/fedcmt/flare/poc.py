"""FLARE's POC: a server and one client per site as services of this machine, with certificates, run for one job.

All of it is in one folder: FLARE's POC, and the HOME that ``nvflare poc prepare`` writes its registry to. The server
listens on a port that was free, so that several POCs run beside one another.
"""

import json
import re
import shutil
import site
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from fedcmt.flare.processes import (
    EngineError,
    check_folder,
    end_workspace,
    ending_on_signals,
    processes_of,
    undisturbed,
)
from fedcmt.json_file import write_json
from fedcmt.logs import LAUNCHER_PREFIX
from fedcmt.workspace import WORKSPACE_VARIABLE

ADMIN = "admin@poc.local"
PROJECT = "poc"
_SERVER = "server"
_CONSOLE = "poc_console.log"
"""In the kit of each service: what FLARE writes the service's output to."""
_READY_SECONDS = 180
_COMMAND_SECONDS = 300
_POLL_SECONDS = 0.5
_SERVICES = ("nvflare.private.fed.app.server.server_train", "nvflare.private.fed.app.client.client_train")
"""Modules that the server and each site run from start to end; each job has further processes."""
_DEAD_SITE = re.compile(r"Failing job \S+ due to reported failure from ([\w-]+)")
_DEAD_SERVER = re.compile(r"Job: \S+ child process exit with return code (?!0\b)")
_BUILDERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("nvflare.lighter.impl.workspace.WorkspaceBuilder", {"template_file": ["master_template.yml"]}),
    ("nvflare.lighter.impl.static_file.StaticFileBuilder", {"config_folder": "config", "scheme": "grpc"}),
    ("nvflare.lighter.impl.cert.CertBuilder", {}),
    ("nvflare.lighter.impl.signature.SignatureBuilder", {}),
    ("fedcmt.flare.provision.KitRules", {}),
)


def run_poc(
    job_folder: Path,
    folder: Path,
    sites: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    on_line: Callable[[str], None],
) -> None:
    """Prepare and start a POC with the job's sites, run the job in it, keep its results and end it.

    Args:
      job_folder: The materialised job.
      folder: Of the POC; what is in it is replaced. ``result/`` in it has what FLARE hands out of a finished job.
      sites: Names of the job's sites.
      environment: Of the services; by the workspace in it they are found and ended.
      log: Receives every line the services write, with the service's name.
      on_line: Gets every line too, without it, for the terminal.

    Raises:
      EngineError: If the POC cannot be started or the job does not complete.

    However it ends, also on a signal, no process and no key is left; ``log`` then has all that the services wrote.
    """
    check_folder(folder)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    poc = _Poc(folder, environment)
    with log.open("w") as file, ending_on_signals():
        consoles = _Consoles(poc.kits, file, on_line)
        try:
            port = poc.prepare(sites)
            on_line(f"{LAUNCHER_PREFIX}POC: starting a server on port {port} and {len(sites)} sites")
            poc.start()
            services = _Services(environment.get(WORKSPACE_VARIABLE))

            def watch() -> None:
                consoles.show()
                services.check()

            poc.run(job_folder, watch)
        except EngineError as error:
            consoles.show()
            raise EngineError(f"{consoles.died or error}; all that was logged is in {log}") from error
        finally:
            with undisturbed():
                try:
                    end_workspace(environment.get(WORKSPACE_VARIABLE))
                    consoles.show()
                finally:  # also where the terminal that lines are shown on is gone
                    remove_kits(folder)


def remove_kits(folder: Path) -> None:
    """Remove the keys that a POC made in this folder, also one that had no time to: each run makes its own."""
    for made in (_root(folder), _home(folder)):
        if made.exists():
            shutil.rmtree(made)


def _root(folder: Path) -> Path:
    return folder / "poc"


def _home(folder: Path) -> Path:
    return folder / "home"


class _Poc:
    """FLARE's own commands, each in a process of its own."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.root = _root(folder)
        self.kits = self.root / PROJECT / "prod_00"
        self._folder = folder
        self._environment = {**environment, "NVFLARE_POC_WORKSPACE": str(self.root)}

    def prepare(self, sites: Sequence[str]) -> int:
        """Make the startup kits; returns the server's port."""
        port = _free_port()
        file = self._folder / "project.yml"
        write_json(file, project(sites, port), indent=2)  # which is YAML too
        home = _home(self._folder)
        home.mkdir(mode=0o700)
        # It registers its kits below HOME; packages that pip installed for one user are below HOME as well.
        own_home = {"HOME": str(home), "PYTHONUSERBASE": site.getuserbase()}
        # FLARE leaves the key of the certificate authority to the umask.
        self._nvflare("poc", "prepare", "-i", str(file), "--force", extra=own_home, umask=0o077)
        return port

    def start(self) -> None:
        """Start the services and wait until the sites have connected."""
        self._nvflare("poc", "start", "--timeout", str(_READY_SECONDS), timeout=_READY_SECONDS + 60)

    def run(self, job_folder: Path, watch: Callable[[], None]) -> None:
        """Submit the job, follow it to its end, and fetch what FLARE keeps of it; ``watch`` may end it by raising."""
        job = str(self._nvflare("job", "submit", "-j", str(job_folder), *self._as_admin())["job_id"])
        command = _command("job", "wait", job, "--interval", "1", *self._as_admin())
        with subprocess.Popen(
            command, env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        ) as waiting:  # fmt: skip
            try:
                while waiting.poll() is None:
                    watch()
                    time.sleep(_POLL_SECONDS)
            finally:
                waiting.kill()
            assert waiting.stdout is not None
            answer = waiting.stdout.read()
        if waiting.returncode != 0:
            raise EngineError(f"the job did not complete in FLARE's POC: {_reason(answer)}")
        self._nvflare("job", "download", job, "-o", str(self._folder / "result"), *self._as_admin())

    def _as_admin(self) -> tuple[str, str]:
        return "--startup-kit", str(self.kits / ADMIN)

    def _nvflare(
        self,
        *words: str,
        extra: Mapping[str, str] | None = None,
        timeout: float = _COMMAND_SECONDS,
        umask: int = -1,
    ) -> dict[str, Any]:
        """The data a command answers with."""
        try:
            done = subprocess.run(
                _command(*words),
                env={**self._environment, **(extra or {})},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
                start_new_session=True,  # what it starts must not see the terminal's Ctrl-C before we end it
                umask=umask,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"nvflare {words[0]} {words[1]}: no answer within {timeout:.0f} s") from error
        if done.returncode != 0:
            raise EngineError(f"nvflare {words[0]} {words[1]} failed: {_reason(done.stdout + done.stderr)}")
        return _answer(done.stdout).get("data") or {}


class _Services:
    """The server's and the sites' own processes: one that dies is started again, but not back into the job.

    FLARE then goes on listing the job as running, and whoever waits for it waits for ever.
    """

    def __init__(self, workspace: str | None) -> None:
        self._found: dict[psutil.Process, str] = {}
        for process in processes_of(workspace):
            with suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if any(module in words for module in _SERVICES):
                    self._found[process] = Path(words[words.index("-m", words.index("-m") + 1) + 1]).name

    def check(self) -> None:
        """Raise `EngineError` if one has ended."""
        for process, name in self._found.items():
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                raise EngineError(f"the process of {name!r} ended while the job ran")


class _Consoles:
    """The lines that services write, in the order in which they are found.

    Attributes:
      died: Which process of the job ended before the job, as far as these lines have told.
    """

    def __init__(self, kits: Path, log: IO[str], on_line: Callable[[str], None]) -> None:
        self.died: str | None = None
        self._kits = kits
        self._log = log
        self._on_line = on_line
        self._read: dict[Path, int] = {}

    def show(self) -> None:
        """Hand on every line that has been completed since the last time."""
        for path in sorted(self._kits.glob(f"*/{_CONSOLE}")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                whole, newline, _ = file.read().rpartition(b"\n")
            self._read[path] = self._read.get(path, 0) + len(whole) + len(newline)
            for line in whole.decode(errors="replace").split("\n") if newline else ():
                self._log.write(f"{path.parent.name}: {line}\n")
                self.died = self.died or _told_death(line)
                self._on_line(line)
        self._log.flush()


def _told_death(line: str) -> str | None:
    """What the user is told where FLARE's server writes that a process of the job has ended too early."""
    site_name, server = _DEAD_SITE.search(line), _DEAD_SERVER.search(line)
    if not (site_name or server):
        return None
    whose = f"site {site_name[1]!r}" if site_name else "the server"
    return f"the job's process at {whose} died (it was killed, ran out of memory or crashed)"


def project(sites: Sequence[str], port: int) -> dict[str, Any]:
    """A provisioning project for one machine: server, sites and one administrator."""
    server = {"name": _SERVER, "type": "server", "org": "poc", "fed_learn_port": port, "admin_port": port}
    clients = [{"name": name, "type": "client", "org": "poc"} for name in sites]
    admin = {"name": ADMIN, "type": "admin", "org": "poc", "role": "project_admin"}
    return {
        "api_version": 3,
        "name": PROJECT,
        "description": "one job on one machine",
        "participants": [server, *clients, admin],
        "builders": [{"path": path, "args": args} for path, args in _BUILDERS],
    }


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "nvflare.cli", *words, "--format", "json"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _answer(output: str) -> dict[str, Any]:
    """The JSON object that a command printed, on its last line that is one."""
    for line in reversed(output.splitlines()):
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        if isinstance(answer, dict):
            return answer
    return {}


def _reason(output: str) -> str:
    """Why a command failed: what its JSON says, else the end of what it printed."""
    answer = _answer(output)
    told = [str(answer[key]) for key in ("message", "detail", "hint") if answer.get(key)]
    return "; ".join(told) or output.strip()[-500:] or "it said nothing"
