"""The engine without FLARE: sites are objects in this process, one after the other.

No start-up and no polling; the numbers are those of FLARE's simulator, since the federation, the sites, their random
streams and their number of threads are the same. It is what sweeps, comparisons and most tests use.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from fedcmt.config import JobConfig, build_algorithm
from fedcmt.federation import Federation
from fedcmt.messages import Failure, Keep, Message, Task, as_it_is, failure_of
from fedcmt.nnunet.planner import FederatedPlanner
from fedcmt.params import Params, Tensors
from fedcmt.site import Site

logger = logging.getLogger(__name__)


class InProcessChannel:
    """Hands messages to sites; tensors are copied on the way as they would be on a wire."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self._sites = sites

    def exchange(
        self, task: Task, messages: Mapping[str, Message], keep: Keep = as_it_is
    ) -> dict[str, Message | Failure]:
        """One site after the other, in the order of the messages."""
        return {site: self._one(task, site, message, keep) for site, message in messages.items()}

    def _one(self, task: Task, site: str, message: Message, keep: Keep) -> Message | Failure:
        try:
            return keep(site, _copied(self._sites[site].handle(task, _copied(message))))
        except Exception as error:
            logger.error("%s: task %s failed: %s", site, task.value, error)
            logger.debug("traceback", exc_info=error)
            return failure_of(task, error)


def run_in_process(job: JobConfig, workspace: Path, *, resume: bool = False) -> dict[str, Any]:
    """Run a job and return its results.

    Args:
      job: The materialised job.
      workspace: Holds ``server/``, ``sites/<site>/`` and ``tensorboard/``.
      resume: Continue after the last finished round.

    Raises:
      FederationError: If a site cannot be prepared, or too few sites answer in a round.
    """
    writers = {name: SummaryWriter(workspace / "tensorboard" / name) for name in (*job.sites, "server")}
    sites = {
        name: Site(name, config, build_algorithm(job.algorithm), workspace / "sites" / name, writers[name].add_scalar)
        for name, config in job.sites.items()
    }
    federation = Federation(
        build_algorithm(job.algorithm),
        FederatedPlanner(job.server.planning, job.server.seed),
        job.server,
        job=job.name,
        folder=workspace / "server",
        resume=resume,
        on_round=lambda round_idx, curves: _report(writers["server"], round_idx, curves),
    )
    try:
        return federation.run(InProcessChannel(sites), list(sites))
    finally:
        for site in sites.values():
            site.close()
        for writer in writers.values():
            writer.close()


def _report(writer: SummaryWriter, round_idx: int, curves: Mapping[str, float]) -> None:
    for tag, value in curves.items():
        writer.add_scalar(tag, value, round_idx)


def _copied(message: Message) -> Message:
    def copies(tensors: Tensors) -> Params:
        return {name: tensor.clone() for name, tensor in tensors.items()}

    return Message(message.meta, copies(message.tensors), copies(message.extras))
