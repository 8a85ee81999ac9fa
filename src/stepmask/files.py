"""Files that are written whole or not at all."""

import os
import tempfile
from pathlib import Path

from stepmask.errors import UnwritablePath


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write `content` to `path` through a temporary neighbour, so that a reader never sees half a file.

    Raises:
        UnwritablePath: The folder cannot be made or written; nothing is left behind.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise _unwritable(path, error) from error
    return path


def _unwritable(path: Path, error: OSError) -> UnwritablePath:
    return UnwritablePath(
        given=f"cannot write {path} ({error.strerror or error})",
        expected="a folder that this process may write to",
        advice="Choose another path, or change the folder's permissions",
    )
