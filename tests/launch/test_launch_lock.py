"""One process at a time writes to a run folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from t2i.errors import UserError
from t2i.launch.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from t2i.launch.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_it_names_who_holds_it_and_is_free_when_that_one_died(tmp_path):
    environment = os.environ | {"SLURM_JOB_ID": "4711"}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as held:
        assert held.stdout is not None
        assert held.stdout.readline() == "held\n"
        with pytest.raises(UserError) as raised, locked(tmp_path, patience_s=0.3):
            pass
        assert f"is written by process {held.pid} on {os.uname().nodename}, job 4711" in str(raised.value)
        held.send_signal(signal.SIGKILL)
    with locked(tmp_path, patience_s=5):
        pass
    with locked(tmp_path, patience_s=0):
        pass
