"""A lock keeps a second holder out, or lets it wait, and ends with its holder's process."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedcmt.file_lock import InUseError, exclusive
from fedcmt.workspace import SOURCES, child_environment

HOLDER = """
import sys, time
from pathlib import Path
from fedcmt.file_lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_holder_is_refused_by_the_folder_s_name_until_the_first_has_ended(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with exclusive(file), pytest.raises(InUseError, match=f"{tmp_path} is in use by another process"), exclusive(file):
        pass
    with exclusive(file):
        pass


def test_one_that_may_wait_says_so_and_gets_the_lock_of_a_holder_that_was_killed(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    command = [sys.executable, "-c", HOLDER, str(file)]
    with subprocess.Popen(command, env=child_environment(SOURCES, {}), stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        waited = []

        def kill() -> None:
            waited.append(file)
            holder.send_signal(signal.SIGKILL)

        with exclusive(file, on_wait=kill):
            assert waited == [file]


def test_one_that_may_wait_does_not_where_nobody_holds_it(tmp_path: Path) -> None:
    with exclusive(tmp_path / ".lock", on_wait=lambda: pytest.fail("waited")):
        pass
