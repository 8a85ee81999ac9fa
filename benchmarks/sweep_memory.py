"""Peak memory of a sweep over that of sampling, DiT-XL/2 with random weights; the peaks as predicted and as measured.

Every run has a process of its own. Memory is that of the whole process, weights included.
"""

import json
import resource
import sys
from typing import Any

import stepmask
from architectures import ARCHITECTURES
from results import alone, save
from stepmask import zoo

SETTINGS: dict[str, dict[str, Any]] = {
    "DiT-XL/2, a sample, 50 steps": {"class_labels": [207], "guidance_scale": 1.0, "num_inference_steps": 50},
    "zoo:dit-emoji, 8 guided samples, 20 steps": {"class_labels": list(range(8)), "num_inference_steps": 20},
}
MUST = next(iter(SETTINGS))


def pipeline(setting: str) -> Any:
    """The zoo's, or DiT-XL/2 with a small decoder."""
    if not setting.startswith("zoo:"):
        return ARCHITECTURES["DiT-XL/2, 256"].pipeline()
    pipe = zoo.load(setting.partition(",")[0])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(way: str, setting: str) -> dict[str, Any]:
    """Sample, or sweep with one probe; the process's peak memory in bytes, and what the sweep said of its own."""
    pipe, call, found = pipeline(setting), SETTINGS[setting], {}
    if way == "sampling":
        pipe(**call)
    else:
        recorded = stepmask.record(pipe, **call)
        told = stepmask.sweep(pipe, recorded, probes=1, checkpoint_blocks=True).provenance
        found = {name: told[name] for name in ("predicted_bytes", "measured_bytes")}
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, **found}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(run(*sys.argv[1:])))
        return
    found: dict[str, Any] = {}
    for setting in SETTINGS:
        sampling, sweep = (json.loads(alone(__file__, way, setting)) for way in ("sampling", "sweep"))
        ratio = sweep["peak_bytes"] / sampling["peak_bytes"]
        near = sweep["predicted_bytes"] / sweep["measured_bytes"]
        found[setting] = {"sampling": sampling, "sweep": sweep, "ratio": ratio, "predicted_over_measured": near}
        print(setting, f"{ratio:.3f}, predicted over measured {near:.3f}", file=sys.stderr, flush=True)
    save(
        "sweep_memory",
        {"what": "sweep with one probe and checkpointed blocks over sampling, whole process", "settings": found},
        goal="ratio at most 1.5 for DiT-XL/2, a sample, 50 steps",
        met=found[MUST]["ratio"] <= 1.5,
    )


if __name__ == "__main__":
    main()
