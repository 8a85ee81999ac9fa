"""Schedules on disk: JSON with an item a line, so that a diff shows what changed, and a tensor file for vectors."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import numpy as safetensors

from stepmask.errors import HubError, InvalidSchedule, InvalidScheduleFile
from stepmask.files import as_path, clear_leftovers, read_at_most, write_together
from stepmask.hub import Source
from stepmask.schedule.channels import Channels, Vectors, reads_of
from stepmask.schedule.limits import MAX_TEXT
from stepmask.text import shortened, told

FORMAT = "stepmask/1"
FILE_NAME = "stepmask.json"
TENSORS_NAME = "stepmask.safetensors"


def contents(text: str, tensors: bytes | None) -> dict[str, str | bytes]:
    """The files of a schedule by name: the tensor file, if any, goes before the JSON that names it."""
    beside: dict[str, str | bytes] = {} if tensors is None else {TENSORS_NAME: tensors}
    return {**beside, FILE_NAME: text}


def write(folder: str | bytes | Path, files: Mapping[str, str | bytes]) -> Path:
    """Write the files of a schedule to a folder, and return the path of its JSON."""
    folder = as_path(folder)
    clear_leftovers(folder)
    write_together({folder / name: content for name, content in files.items()})
    return folder / FILE_NAME


def read(source: Source) -> tuple[str, bytes | None]:
    """The text of a schedule file and the tensor file it names.

    Raises:
        InvalidScheduleFile: One of them is not there, or the text is no schedule's.
    """
    try:
        path = source.file(FILE_NAME)
        text = read_at_most(path, MAX_TEXT).decode("utf-8")
    except HubError as error:
        raise InvalidScheduleFile(**error.parts) from error
    except (OSError, ValueError) as error:
        raise not_a_schedule(str(source.place), str(error)) from error
    if (name := _tensor_file(text, str(source.place))) is None:
        return text, None
    try:
        return text, source.beside(path, name).read_bytes()
    except (OSError, ValueError) as error:
        raise not_a_schedule(str(source.place), f"its tensor file {name} cannot be read ({error})") from error


def _tensor_file(text: str, place: str) -> str | None:
    """The name of the tensor file beside a schedule file: a bare name, which leads to no other folder."""
    named = from_text(text, place).get("tensors")
    if named is None:
        return None
    name = named.get("file") if isinstance(named, dict) else None
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise not_a_schedule(place, f"{told(named)} names no tensor file beside it")
    return name


def pack(channels: Channels) -> bytes | None:
    """The tensor file of per-channel vectors, a tensor "step.column" a cell; `None` where there are none."""
    if not channels:
        return None
    return safetensors.save({f"{step}.{column}": vectors for (step, column), vectors in channels.items()})


def name_tensors(tensors: bytes | None) -> dict[str, Any]:
    """How a schedule's JSON names its tensor file; empty without one."""
    if tensors is None:
        return {}
    return {"tensors": {"file": TENSORS_NAME, "sha256": hashlib.sha256(tensors).hexdigest()}}


def unpack(
    named: Mapping[str, str] | None, tensors: bytes | None, reads: Mapping[tuple[int, int], int]
) -> dict[tuple[int, int], Vectors]:
    """The per-channel vectors in a tensor file, which must be the one that a schedule's JSON names.

    Args:
        named: Name and hash in the JSON; `None` = it names no tensor file.
        tensors: The file's bytes; `None` = there is none.
        reads: How many stored values each per-channel cell reads, as the JSON has it.

    Raises:
        InvalidScheduleFile: The file is missing, not asked for, cut short, another, or holds other cells.
    """
    if named is not None and tensors is None:
        raise not_a_schedule("the text", f"its per-channel forecasts are in {named['file']}, which was not given")
    channels = {}
    if tensors is not None:
        if hashlib.sha256(tensors).hexdigest() != (named or {}).get("sha256"):
            raise not_a_schedule("the text", "its tensor file is cut short, or is another than the one it names")
        channels = _load(tensors)
    if {cell: reads_of(vectors) for cell, vectors in channels.items()} != reads:
        raise not_a_schedule("the text", "its per-channel cells are not those of its tensor file")
    return channels


def _load(tensors: bytes) -> dict[tuple[int, int], Vectors]:
    try:
        loaded = safetensors.load(tensors)
    except SafetensorError as error:
        raise not_a_schedule("the tensor file", str(error)) from error
    cells = {}
    for name, vectors in loaded.items():
        step, _, column = name.partition(".")
        cells[int(step), int(column)] = vectors
    return cells


def to_text(data: dict[str, Any]) -> str:
    """JSON whose top-level lists have an item a line; the format comes first.

    Raises:
        InvalidSchedule: JSON or UTF-8 cannot hold something in it, or it is longer than a reader takes.
    """
    parts = []
    try:
        for key, value in {"format": FORMAT, **data}.items():
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
            if isinstance(value, list) and value:
                items = ",\n  ".join(json.dumps(item, ensure_ascii=False, allow_nan=False) for item in value)
                text = f"[\n  {items}\n ]"
            parts.append(f" {json.dumps(key)}: {text}")
        text = "{\n" + ",\n".join(parts) + "\n}\n"
        size = len(text.encode())
    except (ValueError, TypeError, RecursionError) as error:
        raise _unwritable(str(error)) from error
    if size > MAX_TEXT:
        raise _unwritable(f"{size} bytes of text")
    return text


def _unwritable(problem: str) -> InvalidSchedule:
    return InvalidSchedule(
        given=f"a schedule that cannot be written ({problem})",
        expected=f"plain JSON values in at most {MAX_TEXT} bytes",
        advice="Keep what belongs to it but is no JSON elsewhere than in its provenance",
    )


def parsed(text: str) -> Any:
    """The value that a JSON text holds.

    Raises:
        ValueError: It is too long, not JSON, nested too deeply, or has a NaN or an infinity.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"more than {MAX_TEXT} characters")
    try:
        return json.loads(text, parse_constant=_refused)
    except RecursionError as error:
        raise ValueError("lists and objects nested too deeply") from error


def _refused(constant: str) -> None:
    raise ValueError(f"{constant}, which JSON has not")


def from_text(text: str, place: str = "the text") -> dict[str, Any]:
    """The data in a schedule's JSON text, which errors name by its place.

    Raises:
        InvalidScheduleFile: The text is not JSON, or of another format.
    """
    try:
        data = parsed(text)
    except ValueError as error:
        raise not_a_schedule(place, f"not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise not_a_schedule(place, f"format {told(found)}")
    return data


def not_a_schedule(source: str, problem: str) -> InvalidScheduleFile:
    """The error for a file that is no schedule."""
    return InvalidScheduleFile(
        given=f"{source}: {shortened(problem, 1000)}",
        expected=f"a whole schedule in format {FORMAT}",
        advice="Save schedules with save_pretrained, and copy all that it wrote again if a file was cut short",
    )
