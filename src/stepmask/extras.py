"""Optional dependencies: which is missing, what it is for, and the extra that brings it."""

from collections.abc import Iterator
from contextlib import contextmanager

from stepmask.errors import MissingExtra


@contextmanager
def extra(name: str, package: str, use: str) -> Iterator[None]:
    """Around the import of an optional dependency.

        with extra("evaluate", "matplotlib", "pictures"):
            import matplotlib.figure

    Args:
        name: The extra of stepmask that brings it.
        package: As people call it.
        use: What it is for.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise missing(name, package, use) from error


def missing(name: str, package: str, use: str) -> MissingExtra:
    """What to raise where a package is not there."""
    return MissingExtra(given=f"no {package}", expected=f"it, for {use}", advice=f"pip install 'stepmask[{name}]'")
