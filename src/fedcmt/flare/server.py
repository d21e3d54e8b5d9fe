"""The server's side of FLARE: a controller that carries the federation's messages."""

import gc
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.analytix import AnalyticsDataType
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask
from nvflare.apis.controller_spec import Task as FlareTask
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo
from nvflare.security.logging import secure_format_exception

from fedcmt.algorithms.base import Algorithm
from fedcmt.config import ServerConfig, check_job_name
from fedcmt.federation import Federation, FederationError
from fedcmt.file_lock import InUseError, exclusive
from fedcmt.flare.codec import decode_answer, encode, register_tensors
from fedcmt.job_checks import check_planning
from fedcmt.json_file import write_json
from fedcmt.logs import log_for_launcher
from fedcmt.messages import Failure, Keep, Message, Task, as_it_is
from fedcmt.nnunet.planner import FederatedPlanner
from fedcmt.workspace import is_resuming, workspace_folder

_POLL_SECONDS = 0.1


class FederatedRounds(Controller):
    """FLARE workflow: runs the federation of `fedcmt.federation` over this job's sites.

    Args:
      num_rounds: Rounds to run.
      schedule_rounds: Rounds over which learning rates decay and distillation ramps up; null is ``num_rounds``.
      planning: Keys of `fedcmt.nnunet.planning_options.PlanningOptions`.
      min_sites: Fewer updates than this in a round end the job; null asks for every site.
      seed: Makes a CPU run repeatable.
      round_timeout: Seconds a site may take for its part of a round.
      setup_timeout: Seconds a site may take for each task before and after the rounds.
      contribution: Keys of `fedcmt.config.ContributionConfig`.
      max_norm_ratio: Largest update in units of the median size of its round's; null is any.
      cross_site: Whether to score each site's model at every other site in the last round.
      privacy: Keys of `fedcmt.privacy.terms.PrivacyTerms`.
      update_dtype: Numbers of sites' updates on the wire: float32, float16 or int8.
      continues: In a provisioned network, FLARE's id of the job that began the federation this one goes on with.
      aggregator_id: Id of the FLARE component that is the algorithm.
    """

    def __init__(
        self,
        num_rounds: int,
        planning: dict | None = None,
        min_sites: int | None = None,
        seed: int = 0,
        round_timeout: int = 3600,
        setup_timeout: int = 86400,
        schedule_rounds: int | None = None,
        contribution: dict | None = None,
        max_norm_ratio: float | None = None,
        cross_site: bool = False,
        privacy: dict | None = None,
        update_dtype: str = "float32",
        continues: str | None = None,
        aggregator_id: str = "aggregator",
    ) -> None:
        super().__init__()
        args = {"num_rounds": num_rounds, "planning": planning or {}, "min_sites": min_sites, "seed": seed}
        args |= {"round_timeout": round_timeout, "setup_timeout": setup_timeout}
        args |= {"max_norm_ratio": max_norm_ratio}
        args |= {"schedule_rounds": schedule_rounds, "contribution": contribution or {}, "cross_site": cross_site}
        args |= {"privacy": privacy or {}, "update_dtype": update_dtype, "continues": continues}
        self._config = ServerConfig.from_dict(args, "server workflow")
        self._aggregator_id = aggregator_id
        self._algorithm: Algorithm | None = None

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Find the algorithm among the job's components."""
        log_for_launcher("server")
        register_tensors()
        algorithm = fl_ctx.get_engine().get_component(self._aggregator_id)
        if not isinstance(algorithm, Algorithm):
            self.system_panic(f"component {self._aggregator_id!r} is {type(algorithm)}, expected an Algorithm", fl_ctx)
            return
        self._algorithm = algorithm

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Run the job; a federation that cannot go on ends it with the reason."""
        if self._algorithm is None:
            return
        continues = self._config.continues
        root = fl_ctx.get_engine().get_workspace().get_root_dir()
        folder = workspace_folder(root, fl_ctx.get_job_id(), continues)
        federation = Federation(
            self._algorithm,
            FederatedPlanner(self._config.planning, self._config.seed),
            self._config,
            job=_job_name(fl_ctx),
            folder=folder / "server",
            resume=is_resuming() or continues is not None,
            on_round=lambda round_idx, curves: self._report(round_idx, curves, fl_ctx),
        )
        channel = _FlareChannel(self, fl_ctx, abort_signal, self._config)
        (folder / "server").mkdir(parents=True, exist_ok=True)
        try:
            check_job_name(_job_name(fl_ctx), "the submitted meta.json")
            check_planning(self._algorithm, self._config.planning, job=_job_name(fl_ctx))
            with exclusive(folder / "server" / ".lock"):
                results = federation.run(channel, [c.name for c in fl_ctx.get_engine().get_clients()])
        except (FederationError, InUseError, ValueError, OSError) as error:
            self.log_error(fl_ctx, secure_format_exception(error))
            if not abort_signal.triggered:  # else it follows from why FLARE ended the job, which is not known here
                (folder / "server" / "failure.txt").write_text(str(error))
            self.system_panic(str(error), fl_ctx)
            return
        # In FLARE's folder of the job too, which it keeps and hands out.
        downloadable = Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
        for place in (folder / "server", downloadable):
            write_json(place / "results.json", results, indent=2)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing outlives the control flow."""

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """An answer after its task timed out: the round has closed without it."""
        self.log_warning(fl_ctx, f"late answer of {client.name} to task {task_name} ignored")

    def _report(self, round_idx: int, curves: Mapping[str, float], fl_ctx: FLContext) -> None:
        for tag, value in curves.items():
            dxo = create_analytic_dxo(tag, value, AnalyticsDataType.SCALAR, global_step=round_idx)
            send_analytic_dxo(self, dxo, fl_ctx)


class _FlareChannel:
    """One FLARE task per site and request, each with the site's own payload; all of them finite."""

    def __init__(self, controller: Controller, fl_ctx: FLContext, abort_signal: Signal, config: ServerConfig) -> None:
        self._controller = controller
        self._fl_ctx = fl_ctx
        self._abort = abort_signal
        self._config = config

    def exchange(
        self, task: Task, messages: Mapping[str, Message], keep: Keep = as_it_is
    ) -> dict[str, Message | Failure]:
        """Send to every site named, then wait until each task is done, failed or timed out."""
        answers: dict[str, Message | Failure] = {}

        def received(client_task: ClientTask, fl_ctx: FLContext) -> None:
            site = client_task.client.name
            try:
                answer = decode_answer(client_task.result)
                answers[site] = answer if isinstance(answer, Failure) else keep(site, answer)
            except (KeyError, ValueError, TypeError, OSError) as error:
                answers[site] = Failure(f"unreadable answer: {error}")
            client_task.result = None

        timeout = self._config.round_timeout if task in (Task.TRAIN, Task.EVALUATE) else self._config.setup_timeout
        pending = {}
        for site, message in messages.items():
            flare_task = FlareTask(
                name=task.value, data=encode(message, update=False), timeout=timeout, result_received_cb=received
            )
            self._controller.send(task=flare_task, fl_ctx=self._fl_ctx, targets=[site])
            pending[site] = flare_task
        while any(t.completion_status is None for t in pending.values()):
            if self._abort.triggered:
                raise FederationError(f"task {task.value!r}: the job was aborted")
            time.sleep(_POLL_SECONDS)
        gc.collect()  # FLARE's senders are cycles with buffers of half a megabyte, rarely collected otherwise
        return {site: answers.get(site, _no_answer(flare_task)) for site, flare_task in pending.items()}


def _no_answer(flare_task: FlareTask) -> Failure:
    return Failure(f"no answer within {flare_task.timeout} s ({flare_task.completion_status})")


def _job_name(fl_ctx: FLContext) -> str:
    meta: dict[str, Any] = fl_ctx.get_prop(FLContextKey.JOB_META)
    return str(meta["name"])
