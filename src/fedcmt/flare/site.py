"""The site's side of FLARE: an executor that hands tasks to the site's own process and carries its answers back."""

import gc
import logging
from contextlib import ExitStack
from pathlib import Path

from nvflare.apis.analytix import AnalyticsDataType
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo

from fedcmt.config import SiteConfig, component
from fedcmt.file_lock import exclusive
from fedcmt.flare.codec import decode, encode, encode_failure, register_tensors
from fedcmt.json_file import read_json
from fedcmt.local_settings import LOCAL_FILE, LocalSettings
from fedcmt.logs import log_for_launcher
from fedcmt.messages import Failure, Message, Task, failure_of
from fedcmt.site_process import SiteProcess
from fedcmt.workspace import use_assigned_gpu, workspace_folder

logger = logging.getLogger(__name__)


class SiteExecutor(Executor):
    """FLARE executor of every task of a job.

    The site's data and training are in ``site.json`` beside the client configuration; what the site itself says in
    ``local/fedcmt_site.json`` wins over it.

    Args:
      algorithm_id: Id of the FLARE component that is the site's half of the algorithm. FLARE checks that its class may
        be used; the site's process makes its own.
    """

    def __init__(self, algorithm_id: str = "algorithm") -> None:
        super().__init__()
        self._algorithm_id = algorithm_id
        self._site: SiteProcess | None = None
        self._settings = LocalSettings()
        self._held = ExitStack()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Build the site when the job starts here; stop what it started when the job ends."""
        if event_type == EventType.START_RUN:
            log_for_launcher(fl_ctx.get_identity_name())
            use_assigned_gpu(fl_ctx.get_identity_name())
            register_tensors()
        elif event_type == EventType.END_RUN:
            self._held.close()

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Do one task; a failure goes back as its kind only, since messages may name a site's files."""
        if task_name not in set(Task):
            return make_reply(ReturnCode.TASK_UNKNOWN)
        gc.collect()  # FLARE's senders of the last task are cycles with large buffers
        try:
            message = decode(shareable)
            if self._site is None:
                self._site = self._build(message, fl_ctx)
            if task_name == Task.FINGERPRINT:  # the first task, before any data are read
                self._settings.check_privacy(message.meta["privacy"])
            answer = self._site.handle(Task(task_name), message, stop=lambda: abort_signal.triggered)
            return encode_failure(answer) if isinstance(answer, Failure) else encode(answer, update=True)
        except Exception as error:  # noqa: BLE001 (whatever it was, it costs this site its part of the round, not the job)
            logger.error("%s: task %s failed: %s", fl_ctx.get_identity_name(), task_name, error)
            self.log_exception(fl_ctx, f"task {task_name} failed")
            return encode_failure(failure_of(Task(task_name), error))

    def _build(self, message: Message, fl_ctx: FLContext) -> SiteProcess:
        name, workspace = fl_ctx.get_identity_name(), fl_ctx.get_engine().get_workspace()
        self._settings = LocalSettings.from_file(Path(workspace.get_site_config_dir()) / LOCAL_FILE)
        self._settings.apply_to_environment()
        app = Path(workspace.get_app_config_dir(fl_ctx.get_prop(FLContextKey.CURRENT_RUN)))
        site_json, client_json = app / "site.json", app / "config_fed_client.json"
        algorithm = component(read_json(client_json), self._algorithm_id, client_json)
        config = SiteConfig.from_dict(self._settings.over(read_json(site_json)), str(site_json))
        continues = message.meta["continues"]  # the first task is to describe the data, which says so
        folder = workspace_folder(workspace.get_root_dir(), fl_ctx.get_job_id(), continues) / "sites" / name
        folder.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(exclusive(folder / ".lock"))

        def report(tag: str, value: float, step: int) -> None:
            dxo = create_analytic_dxo(tag, value, AnalyticsDataType.SCALAR, global_step=step)
            send_analytic_dxo(self, dxo, fl_ctx)

        site = SiteProcess(name, config, algorithm, folder, report)
        self._held.callback(site.close)
        return site
