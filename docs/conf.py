"""How Sphinx builds these pages: `make docs`."""

from typing import Any

import stepmask
from stepmask import errors

project, author = "stepmask", "the stepmask authors"
copyright = author
release = version = stepmask.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme, html_title = "furo", "stepmask"
html_static_path, html_css_files = ["_static"], ["stepmask.css"]
html_copy_source = False

default_role = "code"  # docstrings write code as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|nn|np|numpy|npt|Figure|matplotlib|Path|pathlib|collections|typing|Any|Callable|optional|tuple\[.*)\b.*",
    ),
    (r"py:.*", r"stepmask\.(denoiser|evaluation|executors|learning|schedule)\..*"),  # what the public names are made of
]


def mark_examples(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make literal blocks of a docstring's indented examples, which follow an empty line."""
    for at in reversed(range(2, len(lines))):
        if lines[at].startswith("    ") and not lines[at - 1] and lines[at - 2] and lines[at - 2][0] != " ":
            lines[at:at] = ["::", ""]


def find_error(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Lead from an error's bare name, as docstrings have it, to its place."""
    if not hasattr(errors, target := node.get("reftarget", "")):
        return None
    full = f"stepmask.errors.{target}"
    return env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, "exc", full, node, content)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", mark_examples, priority=100)
    app.connect("missing-reference", find_error)
