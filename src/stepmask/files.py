"""Files that are written whole or not at all, and that tell when they were changed since."""

import errno
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

from stepmask.errors import UnwritablePath

TEMPORARY = re.compile(r"\.stepmask-(?P<place>[0-9a-f]{8})-(?P<process>\d{1,9})-[0-9a-f]{16}")
"""Name of a file that is being written: by which process, and where that one lives."""

DAY = 24 * 60 * 60
"""In seconds: nobody takes as long to write a file."""

SEAL = b"\nsha256 "
"""Begins the line that `sealed` adds to a content; its hash in hexadecimal digits follows."""


def as_path(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> Path:
    """A path as the file system's functions take it: text, or the bytes of a name."""
    return Path(os.fsdecode(path))


def check_writable(path: str | Path) -> None:
    """Refuse a path of a file that cannot be written, before there is anything to write; nothing is made.

    Raises:
        UnwritablePath: It is a folder, or what is there above it is none or may not be written to.
    """
    path = Path(path).absolute()
    nearest = next(place for place in path.parents if os.path.exists(place))
    if path.is_dir():
        reason = "it is a folder"
    elif not nearest.is_dir():
        reason = f"{nearest} is no folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        reason = f"{nearest} may not be written to"
    else:
        return
    raise UnwritablePath(
        given=f"cannot write {path} ({reason})",
        expected="a place that this process may write to",
        advice="Choose another path, or change the folder's permissions",
    )


def check_writable_folder(path: str | Path) -> None:
    """Refuse a folder into which nothing can be written; nothing is made.

    Raises:
        UnwritablePath: It, or what is there above it, is no folder or may not be written to.
    """
    check_writable(Path(path) / "file")


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
    others, so that a reader notices. Power may fail, too: what has a name was on the disk before it got it.

    Raises:
        UnwritablePath: A folder cannot be made or written; nothing is left behind.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            temporaries[path] = _neighbour(path)
            _write(temporaries[path], content.encode() if isinstance(content, str) else content)
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


def _neighbour(path: Path) -> Path:
    """The path of a new file beside `path`, which must be no folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return path.with_name(f".stepmask-{_place()}-{os.getpid()}-{secrets.token_hex(8)}")


def _write(path: Path, content: bytes) -> None:
    """A new file, on the disk when this returns."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)


def clear_leftovers(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left in a folder, as far as this one may.

    A file goes if its name says that a process of this machine was writing it and there is no such process now, or if
    it is a day old. What a living process, or one of another machine, is writing stays.
    """
    with suppress(OSError):  # nobody is waiting for it
        for path in folder.iterdir():
            if (named := TEMPORARY.fullmatch(path.name)) and _is_left_behind(path, named):
                path.unlink(missing_ok=True)


def _is_left_behind(path: Path, named: re.Match[str]) -> bool:
    if named["place"] == _place() and not _is_alive(int(named["process"])):
        return True
    return time.time() - path.stat().st_mtime > DAY


def _is_alive(process: int) -> bool:
    """Whether a process of this machine is there, as far as the system says without harm to it."""
    if os.name == "nt":
        return True  # there signal 0 is an interrupt
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@cache
def _place() -> str:
    """Where numbers of processes mean the same: this machine, and in it this container."""
    try:
        container = os.readlink("/proc/self/ns/pid")
    except OSError:
        container = ""
    return sha256(f"{socket.gethostname()} {container}".encode()).hexdigest()[:8]


def sealed(content: str | bytes) -> bytes:
    """A content with its hash behind it."""
    plain = content.encode() if isinstance(content, str) else content
    return plain + SEAL + sha256(plain).hexdigest().encode() + b"\n"


def unsealed(content: bytes) -> bytes:
    """What `sealed` was given.

    Raises:
        ValueError: There is no hash behind it, or another one: not a byte may have changed.
    """
    plain, seal, told = content.rpartition(SEAL)
    if not seal:
        raise ValueError("it ends without a checksum: it was cut short, or written by a version before checksums")
    if told != sha256(plain).hexdigest().encode() + b"\n":
        raise ValueError("its checksum is another: it was changed or cut short")
    return plain


def read_at_most(path: Path, most: int) -> bytes:
    """The content of a file that may be anybody's.

    Raises:
        ValueError: It has more bytes than that.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most} bytes")
    return content
