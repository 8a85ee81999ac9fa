"""The benchmark that is to run on a GPU: the whole of it, tiny, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


PARTS = ["overhead", "learned tables", "learning", "FLUX, 1024"]
"""One of the large denoisers, for all four take a minute: `gpu.py --tiny` is all of it."""


def test_all_parts_finish_and_what_they_find_is_filed(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--out", str(out), "--parts", *PARTS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(script, cwd=tmp_path, env=environment, check=True, capture_output=True)

    found = json.loads(out.read_text())
    parts = found["parts"]
    assert list(parts) == PARTS
    assert not [name for name, part in parts.items() if "failed" in part or "skipped" in part]
    assert parts["overhead"]["bitwise_equal"]
    assert parts["learned tables"]["ddpm-emoji"]["off_by"] == 0  # of the CPU against itself
    assert 0 < parts["learning"]["error"] < 1

    large = [part for part in parts.values() if "eager" in part]
    assert len(large) == 1
    for part in large:
        assert (
            part["eager"].keys() == part["compiled, over compiled"].keys() == {"interval 2, Taylor 1", "single cells"}
        )
        assert all(row["store_bytes"] > 0 for row in part["eager"].values())
        assert all(0.3 < row["macs"] < 0.6 for row in part["eager"].values())
    assert found["machine"]["torch"]
