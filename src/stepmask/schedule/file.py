"""Schedules on disk: where they lie, and JSON with an item a line, so that a diff shows what changed."""

import json
from pathlib import Path
from typing import Any

from stepmask.errors import InvalidScheduleFile
from stepmask.files import write_whole

FORMAT = "stepmask/1"
FILE_NAME = "stepmask.json"


def write(folder: str | Path, text: str) -> Path:
    """Write `folder/stepmask.json` whole and return its path."""
    return write_whole(Path(folder) / FILE_NAME, text)


def read(source: str | Path, *, revision: str | None = None, token: str | None = None) -> str:
    """The text of a schedule file: a path to it, its folder, or a hub repository.

    Raises:
        InvalidScheduleFile: There is none, or it is no text.
    """
    path = Path(source)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        path = _from_hub(str(source), revision, token)
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise not_a_schedule(str(path), str(error)) from error


def _from_hub(source: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(source, FILE_NAME, revision=revision, token=token))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise not_a_schedule(source, f"no such file, folder or hub repository ({reason})") from error


def to_text(data: dict[str, Any]) -> str:
    """JSON whose top-level lists have an item a line; the format comes first."""
    parts = []
    for key, value in {"format": FORMAT, **data}.items():
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if isinstance(value, list) and value:
            items = ",\n  ".join(json.dumps(item, ensure_ascii=False, allow_nan=False) for item in value)
            text = f"[\n  {items}\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def from_text(text: str) -> dict[str, Any]:
    """The data in a schedule's JSON text.

    Raises:
        InvalidScheduleFile: The text is not JSON, or of another format.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise not_a_schedule("the text", f"not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise not_a_schedule("the text", f"format {found!r}")
    return data


def not_a_schedule(source: str, problem: str) -> InvalidScheduleFile:
    """The error for a file that is no schedule."""
    return InvalidScheduleFile(
        given=f"{source}: {problem}",
        expected=f"a whole schedule in format {FORMAT}",
        advice="Save schedules with save_pretrained, and copy the file again if it was cut short",
    )
