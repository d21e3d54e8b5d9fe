"""FLARE's simulator with each site told its own name: the module that `run_simulator` starts.

FLARE 2.9 starts each site's process from a thread of its own, and all these threads write the name of their site into
one dict before they send it (``SimulatorClientRunner.do_one_task``). Two sites that come up at the same moment can so
both be told the name of the second, and the first then looks for the other's configuration in its own folder. Here
each thread has a dict of its own.
"""

import argparse
import copy
import multiprocessing
import os
import sys
from typing import Any

from nvflare.fuel.utils.log_utils import FL_LOG_LEVEL, LogMode
from nvflare.private.fed.app.simulator.simulator import define_simulator_parser
from nvflare.private.fed.app.simulator.simulator_runner import SimulatorClientRunner, SimulatorRunner


class SitesRunner(SimulatorClientRunner):
    """Starts the sites' processes, each with settings of its own. For one thread per site only."""

    def do_one_task(self, client: Any, *args: Any, **options: Any) -> Any:
        own = copy.copy(self)
        own.build_ctx = dict(self.build_ctx)
        return super(SitesRunner, own).do_one_task(client, *args, **options)


class Simulator(SimulatorRunner):
    """FLARE's simulator, whose sites are started by `SitesRunner`."""

    def client_run(self, server_custom_folder: str, clients: list[Any], gpu: str | None) -> None:
        settings = (self.args, clients, self.client_config, self.deploy_args, self.build_ctx)
        SitesRunner(server_custom_folder, *settings).run(gpu)


def main() -> int:
    """Take the arguments of FLARE's simulator that `run_simulator` gives, and return its exit code."""
    parser = argparse.ArgumentParser()
    define_simulator_parser(parser)
    options = parser.parse_args()
    simulator = Simulator(
        job_folder=options.job_folder,
        workspace=options.workspace,
        clients=options.clients,
        threads=options.threads,
        log_config=os.environ.get(FL_LOG_LEVEL, LogMode.CONCISE),
    )
    return simulator.run()


if __name__ == "__main__":
    if sys.platform == "darwin":  # as FLARE's own main: a forked process with threads is not safe there
        multiprocessing.set_start_method("spawn")
    sys.exit(main())
