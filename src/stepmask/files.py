"""Files that are written whole or not at all."""

import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from stepmask.errors import UnwritablePath


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write `content` to `path` through a temporary neighbour, so that a reader never sees half a file.

    Raises:
        UnwritablePath: The folder cannot be made or written; nothing is left behind.
    """
    write_together({Path(path): content})
    return Path(path)


def write_together(contents: Mapping[Path, str | bytes]) -> None:
    """Write several files: all of them lie on disk before the first takes its name, in the order given.

    A process that dies between two names leaves new files beside old ones: let the last file name the hashes of the
    others, so that a reader notices.

    Raises:
        UnwritablePath: A folder cannot be made or written; nothing is left behind.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            temporaries[path] = _temporary(path)
            temporaries[path].write_bytes(content.encode() if isinstance(content, str) else content)
            temporaries[path].chmod(0o644)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except OSError as error:
        raise UnwritablePath(
            given=f"cannot write {path} ({error.strerror or error})",
            expected="a folder that this process may write to",
            advice="Choose another path, or change the folder's permissions",
        ) from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """An empty neighbour of `path`, which must be no folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    return Path(temporary)
