"""Progress bars of what takes longer than a moment."""

import os
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

DELAY_S = 2.0
"""What is done earlier shows no bar."""


def progress(items: Iterable[T], title: str, **options: Any) -> "tqdm[T]":
    """The items, with a bar and the time left on a terminal; none elsewhere, or where TQDM_DISABLE is set.

    Args:
        items: What is gone through.
        title: What is done, in front of the bar.
        **options: Of `tqdm.tqdm`.
    """
    return tqdm(items, title, disable=hidden(), delay=DELAY_S, **options)


def hidden() -> bool | None:
    """Tqdm's `disable`: true where TQDM_DISABLE is set; `None`, on a terminal only, elsewhere."""
    return True if os.environ.get("TQDM_DISABLE") else None
