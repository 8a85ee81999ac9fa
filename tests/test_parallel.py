"""Denoisers that two processes share: weights in shards (FSDP), split layers (tensor parallel), split tokens (context)."""

import json
import os
import subprocess
import sys
from pathlib import Path

JOBS = Path(__file__).parent / "parallel_jobs.py"


def test_what_two_processes_find(tmp_path: Path) -> None:
    """All in one: the processes take longer to start than to check. What failed has its name in the message."""
    processes = []
    for rank in range(2):
        command = [sys.executable, str(JOBS), str(rank), str(tmp_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        output = (tmp_path / f"{rank}.txt").open("w")
        processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    ended = [process.wait(timeout=600) for process in processes]
    said = [(tmp_path / f"{rank}.txt").read_text()[-2000:] for rank in range(2)]
    assert ended == [0, 0], said
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    failed = {name: report for both in found for name, report in both["failed"].items()}
    assert not failed, "\n".join(f"== {name}\n{report}" for name, report in failed.items())
    assert found[0]["checked"] == found[1]["checked"] > 0
