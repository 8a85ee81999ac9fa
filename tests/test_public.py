"""The public face: names, lean imports, errors that cross processes."""

import pickle
import subprocess
import sys

import pytest

import stepmask
from stepmask import errors

PUBLIC = {
    "Block", "BlockGraph", "Budget", "LocalExecutor", "MaskSchedule", "Profile", "RayExecutor", "Report",
    "StepmaskError", "Store", "Tiers", "Trajectory", "apply", "evaluate", "learn", "record", "sweep", "trace",
}  # fmt: skip


def test_public_names_are_these_and_no_others() -> None:
    assert set(stepmask.__all__) == set(stepmask._HOME) == PUBLIC
    assert all(callable(getattr(stepmask, name)) for name in PUBLIC)
    with pytest.raises(AttributeError, match="nothing"):
        stepmask.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import stepmask", ["torch", "diffusers", "matplotlib"]),
        ("from stepmask import MaskSchedule, BlockGraph, Budget", ["torch", "diffusers", "huggingface_hub"]),
        ("from stepmask import Profile", ["torch", "diffusers", "huggingface_hub"]),
        ("import stepmask.cli", ["torch", "diffusers", "matplotlib"]),
        ("from stepmask import record, trace, learn, apply, evaluate", ["diffusers", "matplotlib", "skimage"]),
    ],
)
def test_imports_are_lean(statement: str, absent: list[str]) -> None:
    code = f"import sys; {statement}; print([name for name in {absent!r} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def every_error() -> list[type[errors.StepmaskError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", every_error())
def test_an_error_says_three_things_and_crosses_processes(kind: type[errors.StepmaskError]) -> None:
    error = pickle.loads(pickle.dumps(kind(given="a", expected="b", advice="Do c")))
    assert type(error) is kind
    assert str(error) == "a. Expected: b. Do c."
    assert kind.__name__ in (errors.__doc__ or "")
