"""Two profiled processes: one table, one trace, and the communication that nothing hides."""

from __future__ import annotations

import json
import re
import subprocess
import sys


def test_communication_has_its_part(tmp_path, shapes_overrides):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [
        "-m",
        "t2i_cli.main",
        "profile",
        "experiment=pixel_diffusion/tiny_flow_dit",
        *shapes_overrides,
    ]
    command += ["trainer.accelerator=cpu", "trainer.batch_size=4", "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (communication,) = re.findall(r"^ ?communication +([\d.]+) ", done.stdout, re.MULTILINE)
    assert float(communication) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]
    (trace,) = (tmp_path / "profile").iterdir()
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event.get("name") == "gloo:all_reduce" for event in events)
