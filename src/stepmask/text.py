"""Text from outside (names, notes, messages) as a terminal, a page or an error may show it."""

import re

HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that are never shown as they are: they steer a terminal (C0, C1), end a line, turn the direction of what
follows, or stand for half of a character that no file can hold."""

SHOWN = 200
"""Characters of somebody else's text that are shown at most."""


def is_plain(text: str) -> bool:
    """Whether a text has none of the characters that are never shown."""
    return HIDDEN.search(text) is None


def printable(text: str) -> str:
    r"""One line, with an escape such as \x1b for each character that is never shown."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """As `printable`, but ends of lines stay."""
    return "\n".join(map(printable, text.split("\n")))


def shortened(text: str, most: int = SHOWN) -> str:
    """A text, cut after so many characters."""
    return text if len(text) <= most else f"{text[:most]}…"


def told(value: object) -> str:
    """A value from outside in an error: plain ones as they are written, others by their type."""
    if isinstance(value, int) and value.bit_length() > SHOWN:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str | int | float | None):
        return shortened(repr(value))
    return f"a {type(value).__name__}"
