"""How large a schedule may be, in memory and on disk: what a file from a stranger can ask of a machine is bounded."""

from collections.abc import Mapping
from typing import Any

from stepmask.errors import InvalidSchedule
from stepmask.text import is_plain, told

MAX_TEXT = 2**25
"""Bytes of the JSON of a schedule or a profile; a trained table of 100,000 cells takes a third of it."""

MAX_NESTING = 256
"""Lists and objects inside each other in `config` and `provenance`."""

MAX_NAME = 1024
"""Characters of the name of a block, a feeder or a class."""

MAX_STEPS = 4096
"""Steps of a table."""

MAX_BLOCKS = 2048
"""Blocks of a graph, the denoiser itself among them; each may read all before it."""

MAX_CELLS = 2**19
"""Cells of a table, steps times blocks."""

MAX_TABLES = 64
"""Tables of tiers, all together."""

MAX_BRANCHES = 64
"""Calls of the denoiser per step."""

MAX_TENSORS = 1024
"""Tensors that a block returns."""

MAX_DIMENSIONS = 64
"""Dimensions of a tensor."""

MAX_NUMBER = 10**18
"""Any size, time or timestep, whatever its sign; and the MACs of one evaluation, so that their sum is exact."""

MAX_BITS = 4096
"""Of a whole number in `config` and `provenance`, which mean nothing to a reader."""


def is_name(value: object) -> bool:
    """Whether a value is text that may be a module's name: short enough, and nothing in it that is never shown."""
    return isinstance(value, str) and len(value) <= MAX_NAME and is_plain(value)


def is_class(value: object) -> bool:
    """Whether a value is text that may be a class's name: it becomes code in a README.md."""
    return isinstance(value, str) and is_name(value) and value.isidentifier()


def is_whole(value: object, most: int = MAX_NUMBER) -> bool:
    """Whether a value is a whole number from 0 to a limit; a truth value is none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def is_number(value: object) -> bool:
    """Whether a value is a finite number of at most `MAX_NUMBER`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def check_plain(what: str, value: object) -> None:
    """Refuse what is no JSON object, or holds what JSON and UTF-8 cannot: then it could not be written.

    Args:
        what: The field's name.
        value: What it holds.

    Raises:
        InvalidSchedule: It does.
    """
    if not isinstance(value, Mapping):
        raise unplain(what, told(value))
    inside: list[tuple[Any, int]] = [(value, 1)]
    while inside:
        item, depth = inside.pop()
        if depth > MAX_NESTING:
            raise unplain(what, f"lists and objects nested more than {MAX_NESTING} deep")
        if isinstance(item, Mapping):
            inside += [(each, depth + 1) for pair in item.items() for each in pair]
        elif isinstance(item, list | tuple):
            inside += [(each, depth + 1) for each in item]
        elif not _is_scalar(item):
            raise unplain(what, told(item))


def _is_scalar(item: object) -> bool:
    """Whether JSON text in UTF-8 can hold a value that holds no others."""
    if isinstance(item, str):
        return item.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in item)
    if isinstance(item, float):
        return abs(item) < float("inf")
    return item is None or (isinstance(item, int) and item.bit_length() <= MAX_BITS)


def unplain(what: str, problem: str) -> InvalidSchedule:
    """The error for a field that cannot be written."""
    return InvalidSchedule(
        given=f"{what} with {problem}",
        expected=f"an object of plain JSON values: text, finite numbers, lists, at most {MAX_NESTING} deep",
        advice="Leave it out, or write it as text",
    )
