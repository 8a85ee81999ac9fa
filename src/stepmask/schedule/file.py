"""The schedule as a file: readable JSON, one block and one row a line, so that a diff shows what changed."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from stepmask.errors import InvalidSchedule, InvalidScheduleFile
from stepmask.files import write_whole
from stepmask.schedule.fingerprint import DenoiserFingerprint, SamplerFingerprint
from stepmask.schedule.graph import Block, BlockGraph
from stepmask.schedule.schedule import PLAIN, WINDOW, MaskSchedule

FORMAT = "stepmask/1"
FILE_NAME = "stepmask.json"


def save(schedule: MaskSchedule, folder: str | Path) -> Path:
    """Write `folder/stepmask.json` whole and return its path."""
    return write_whole(Path(folder) / FILE_NAME, dumps(schedule))


def load(source: str | Path, *, revision: str | None = None, token: str | None = None) -> MaskSchedule:
    """Read a schedule from a folder, a file, or a hub repository."""
    path = Path(source)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        path = _from_hub(str(source), revision, token)
    try:
        return loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise _foreign(str(path), str(error)) from error
    except InvalidScheduleFile as error:
        raise _foreign(str(path), error.parts["given"]) from error


def _from_hub(source: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(source, FILE_NAME, revision=revision, token=token))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _foreign(source, f"no such file, folder or hub repository ({reason})") from error


def dumps(schedule: MaskSchedule) -> str:
    """The schedule as JSON text."""
    return _lines(
        {
            "format": FORMAT,
            "denoiser": {"class": schedule.denoiser.class_name, "config": dict(schedule.denoiser.config)},
            "sampler": {
                "class": schedule.sampler.class_name,
                "branches": schedule.sampler.branches,
                "timesteps": list(schedule.sampler.timesteps),
                "log_snr": list(schedule.sampler.log_snr),
            },
            "blocks": [_block_to_json(schedule.graph, column) for column in range(len(schedule.graph))],
            "rows": ["".join("01"[int(bit)] for bit in row) for row in schedule.rows],
            "forecasts": _forecasts_to_json(schedule),
            "provenance": dict(schedule.provenance),
        }
    )


def loads(text: str) -> MaskSchedule:
    """The schedule that JSON text describes.

    Raises:
        InvalidScheduleFile: The text is not JSON, not a schedule, or contradicts itself.
    """
    try:
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise _foreign("the text", f"format {found!r}")
        return _schedule_from_json(data)
    except InvalidScheduleFile:
        raise
    except InvalidSchedule as error:
        raise _foreign("the text", str(error)) from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _foreign("the text", f"{type(error).__name__}: {error}") from error


def _schedule_from_json(data: dict[str, Any]) -> MaskSchedule:
    sampler = data["sampler"]
    graph = _graph_from_json(data["blocks"])
    rows = np.array([[{"0": False, "1": True}[bit] for bit in row] for row in data["rows"]], dtype=bool)
    weights = np.tile(PLAIN, (*rows.shape, 1))
    for item in data["forecasts"]:
        cell = [float(weight) for weight in item["weights"]]
        weights[item["step"], _span_to_columns(item["blocks"])] = cell + [0.0] * (WINDOW - len(cell))
    return MaskSchedule(
        graph=graph,
        rows=rows,
        weights=weights,
        denoiser=DenoiserFingerprint(data["denoiser"]["class"], data["denoiser"]["config"]),
        sampler=SamplerFingerprint(
            sampler["class"], tuple(sampler["timesteps"]), tuple(sampler["log_snr"]), sampler["branches"]
        ),
        provenance=data["provenance"],
    )


def _block_to_json(graph: BlockGraph, column: int) -> dict[str, Any]:
    block = graph.blocks[column]
    reads = _columns_to_span(np.flatnonzero(graph.reads[column]).tolist())
    return {"name": block.name, "reuse": block.reuse, "macs": block.macs, "bytes": block.bytes, "reads": reads}


def _graph_from_json(items: list[dict[str, Any]]) -> BlockGraph:
    names = [item["name"] for item in items]
    return BlockGraph(
        tuple(
            Block(
                name=item["name"],
                reads=tuple(names[column] for column in _span_to_columns(item["reads"])),
                reuse=item["reuse"],
                macs=int(item["macs"]),
                bytes=int(item["bytes"]),
            )
            for item in items
        )
    )


def _forecasts_to_json(schedule: MaskSchedule) -> list[dict[str, Any]]:
    """Cells with other weights than plain reuse; blocks of one step with equal weights share an entry."""
    entries = []
    for step, row in enumerate(schedule.forecasts):
        columns: dict[tuple[float, ...], list[int]] = {}
        for column, weights in enumerate(row.tolist()):
            if tuple(weights) != PLAIN:
                columns.setdefault(tuple(weights[: schedule.windows[step, column]]), []).append(column)
        entries += [
            {"step": step, "blocks": _columns_to_span(where), "weights": list(weights)}
            for weights, where in columns.items()
        ]
    return entries


def _columns_to_span(columns: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs = [[column for _, column in run] for _, run in groupby(enumerate(columns), key=lambda item: item[1] - item[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _span_to_columns(span: str) -> list[int]:
    columns: list[int] = []
    for part in filter(None, span.split(",")):
        first, _, last = part.partition("-")
        columns += range(int(first), int(last or first) + 1)
    return columns


def _lines(data: dict[str, Any]) -> str:
    """JSON whose top-level lists of objects or strings have an item a line."""
    parts = []
    for key, value in data.items():
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if isinstance(value, list) and value:
            items = ",\n  ".join(json.dumps(item, ensure_ascii=False, allow_nan=False) for item in value)
            text = f"[\n  {items}\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _foreign(source: str, problem: str) -> InvalidScheduleFile:
    return InvalidScheduleFile(
        given=f"{source}: {problem}",
        expected=f"a whole schedule in format {FORMAT}",
        advice="Save schedules with save_pretrained, and copy the file again if it was cut short",
    )
