"""A site in a process of its own: what kills its training costs the site a round, and not the job.

FLARE ends the whole job when the process of one site dies. So that process holds a `SiteProcess`, which hands each
task to a child that holds the `fedcmt.site.Site`. If the child dies (no memory left, a CUDA error, a segmentation
fault), the task has failed, and the next one starts another child, which goes on from what the site has on disk.

Tensors cross in safetensors files below the site's folder, all else in lines of JSON over two pipes. A child whose
parent is gone ends itself and its loader processes.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from fedcmt.config import SiteConfig, build_algorithm
from fedcmt.messages import Failure, Message, Task, failure_of
from fedcmt.params import load_tensors, save_tensors
from fedcmt.workspace import MALLOC_VARIABLE, SOURCES, child_environment

_MODULE = "fedcmt.site_process"  # the child runs it as __main__
logger = logging.getLogger(_MODULE)
_traceback_logger = logging.getLogger(f"{_MODULE}.traceback")  # no module's: see `fedcmt.logs.log_for_launcher`

Report = Callable[[str, float, int], None]
"""(tag, value, round): one point of a TensorBoard curve."""

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 10.0
"""For a child that is asked to stop: a step of training may have to end first."""
_REQUEST, _ANSWER = "request.safetensors", "answer.safetensors"


class SiteProcess:
    """Does a site's tasks in a child process; see the module.

    Args:
      name: The site's name.
      config: Its data and local training.
      algorithm: The algorithm, as `fedcmt.config.build_algorithm` takes it.
      folder: The site's folder, as `fedcmt.site.Site` takes it.
      report: Receives curves.
    """

    def __init__(
        self,
        name: str,
        config: SiteConfig,
        algorithm: Mapping[str, Any],
        folder: Path,
        report: Report = lambda tag, value, step: None,
    ) -> None:
        self._name = name
        self._settings = {"name": name, "config": asdict(config), "algorithm": dict(algorithm), "folder": str(folder)}
        self._exchange = folder / "exchange"
        self._report = report
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """Of the child process, if there is one."""
        return None if self._child is None else self._child.process.pid

    def handle(self, task: Task, message: Message, stop: Callable[[], bool] = lambda: False) -> Message | Failure:
        """Do one task; whatever goes wrong in the child, also its end, is a `Failure`, and this process's log says why.

        Args:
          task: What to do.
          message: The request.
          stop: Asked several times a second; true ends the task at the next step, or the child some seconds later.
        """
        if self._child is not None and self._child.process.poll() is not None:
            self._end(None)  # between two tasks, so nothing is lost
        if self._child is None:
            self._child = _Child(self._settings)
        _write(self._exchange / _REQUEST, message)
        self._child.send({"task": task.value})
        deadline: float | None = None
        while True:
            event = self._child.next_event()
            if event is None and deadline is None and stop():
                self._child.send({"stop": True})
                deadline = time.monotonic() + _GRACE_SECONDS
            elif event is None and deadline is not None and time.monotonic() > deadline:
                logger.warning("%s: task %s did not stop within %.0f s, ended", self._name, task, _GRACE_SECONDS)
                return self._end(task)
            elif event is not None:
                if "ended" in event:
                    return self._end(task)
                answer = self._take(event)
                if answer is not None:
                    return answer

    def close(self) -> None:
        """End the child and all that it started."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _take(self, event: Mapping[str, Any]) -> Message | Failure | None:
        """The answer, if that is what the child sent; curves and log lines go where they belong."""
        if "report" in event:
            tag, value, step = event["report"]
            self._report(tag, value, step)
        elif "log" in event:
            level, text = event["log"]
            logger.log(level, "%s", text)
        elif "traceback" in event:
            _traceback_logger.error("%s", event["traceback"])
        elif "failure" in event:
            return Failure(event["failure"])
        elif "answer" in event:
            return _read(self._exchange / _ANSWER)
        return None

    def _end(self, task: Task | None) -> Failure:
        assert self._child is not None
        how = self._child.end()
        self._child = None
        when = "between two tasks" if task is None else f"in task {task.value!r}"
        logger.error("%s: the process that does the site's tasks ended %s: %s", self._name, when, how)
        return Failure(f"the site's process ended {when}: {how}")


class _Child:
    """The child process and both pipes, seen from the parent."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        commands_read, commands_write = os.pipe()
        events_read, events_write = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, str(commands_read), str(events_write)],
            env=child_environment(SOURCES, {}, without=[MALLOC_VARIABLE]),
            stdin=subprocess.DEVNULL,
            pass_fds=(commands_read, events_write),
            start_new_session=True,  # so that loader processes can be ended with it
        )
        os.close(commands_read)
        os.close(events_write)
        self._commands = os.fdopen(commands_write, "w")
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._listen, args=(os.fdopen(events_read),), daemon=True).start()
        self.send(settings)

    def send(self, command: Mapping[str, Any]) -> None:
        """One command; to a child that is gone, nothing is said, since its end is an event."""
        try:
            self._commands.write(json.dumps(command) + "\n")
            self._commands.flush()
        except BrokenPipeError:
            return

    def next_event(self) -> dict[str, Any] | None:
        """What the child says next, ``{"ended": ...}`` once it is gone; None if it says nothing for a while."""
        try:
            return self._events.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Let it end by itself, or end it."""
        self.send({"close": True})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=_GRACE_SECONDS)
        self.end()

    def end(self) -> str:
        """End it now, with all that it started; returns how it ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # loader processes outlive a child that was killed
        code = self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._commands.close()
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"

    def _listen(self, events: IO[str]) -> None:
        with events:
            for line in events:
                self._events.put(json.loads(line))
        self._events.put({"ended": True})


def _write(path: Path, message: Message) -> None:
    tensors = {f"tensors/{name}": tensor for name, tensor in message.tensors.items()}
    tensors |= {f"extras/{name}": tensor for name, tensor in message.extras.items()}
    save_tensors(path, tensors, message.meta)


def _read(path: Path) -> Message:
    """The message in a file, which is deleted."""
    stored, meta = load_tensors(path)
    path.unlink()
    parts: dict[str, dict] = {"tensors": {}, "extras": {}}
    for name, tensor in stored.items():
        kind, _, rest = name.partition("/")
        parts[kind][rest] = tensor
    return Message(meta, parts["tensors"], parts["extras"])


# ---------------------------------------------------------------------------------------------------------------------
# The child


class _ToParent(logging.Handler):
    """Sends the package's log lines to the parent, whose log is the site's."""

    def __init__(self, tell: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell({"log": [record.levelno, record.getMessage()]})


def main(commands: IO[str], events: IO[str]) -> None:
    """Do tasks until told to close."""
    from fedcmt.site import Site  # nnU-Net takes seconds to import, and the parent does without

    lock = threading.Lock()  # libraries may log on several threads

    def tell(event: Mapping[str, Any]) -> None:
        with lock:
            events.write(json.dumps(event) + "\n")
            events.flush()

    package = logging.getLogger("fedcmt")
    package.handlers, package.propagate = [_ToParent(tell)], False
    package.setLevel(logging.INFO)
    settings = json.loads(commands.readline())
    site = Site(
        settings["name"],
        SiteConfig.from_dict(settings["config"], f"site {settings['name']!r}"),
        build_algorithm(settings["algorithm"]),
        Path(settings["folder"]),
        lambda tag, value, step: tell({"report": [tag, value, step]}),
    )
    tasks: queue.Queue[str | None] = queue.Queue()
    stopping = threading.Event()
    threading.Thread(target=_obey, args=(commands, tasks, stopping), daemon=True).start()
    while (task := tasks.get()) is not None:
        stopping.clear()
        tell(_do(site, Task(task), Path(settings["folder"]) / "exchange", stopping, tell))
    site.close()


def _obey(commands: IO[str], tasks: "queue.Queue[str | None]", stopping: threading.Event) -> None:
    """Pass commands on; when the parent is gone, end this process and its loaders."""
    for line in commands:
        command = json.loads(line)
        if "stop" in command:
            stopping.set()
        else:
            tasks.put(command.get("task"))
            if "close" in command:
                return
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _do(
    site: Any, task: Task, exchange: Path, stopping: threading.Event, tell: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    try:
        _write(exchange / _ANSWER, site.handle(task, _read(exchange / _REQUEST), stop=stopping.is_set))
        return {"answer": task.value}
    except Exception as error:  # noqa: BLE001 (whatever it was, it costs this site its part of the round, not the job)
        logger.error("%s: task %s failed: %s", site.name, task.value, error)
        tell({"traceback": traceback.format_exc()})
        return {"failure": failure_of(task, error).reason}


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1])) as command_pipe, os.fdopen(int(sys.argv[2]), "w") as event_pipe:
        main(command_pipe, event_pipe)
