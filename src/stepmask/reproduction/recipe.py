"""`Recipe`: a published protocol as a TOML file, and what others reported under it."""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from stepmask.errors import InvalidRecipe

KINDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Sampler:
    """How the pipeline steps.

    Args:
        name: A scheduler of diffusers, by its class name.
        steps: Sampling steps.
        guidance: Guidance scale; `None` = a pipeline without guidance.
        options: Of the scheduler, over those that the checkpoint has.
    """

    name: str
    steps: int
    guidance: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """What is drawn and measured.

    Args:
        count: Pictures.
        batch: Pictures at once.
        conditions: What the protocol draws, for people.
    """

    count: int
    batch: int
    conditions: str = ""


@dataclass(frozen=True)
class Metric:
    """What the published numbers were measured with.

    Args:
        name: Such as "FID".
        tool: The program that measured them.
        reference: The real pictures, or their statistics.
    """

    name: str
    tool: str
    reference: str


@dataclass(frozen=True)
class Calibration:
    """What is learned from, and how much the schedules may spend.

    Args:
        samples: Of all calibration runs.
        batch: Of one run.
        budgets: Shares of the reference's MACs; a schedule for each.
    """

    samples: int
    batch: int
    budgets: tuple[float, ...]


@dataclass(frozen=True)
class Published:
    """A row of somebody's table.

    Args:
        method: Its name there, with its setting.
        source: Where the row stands.
        secondary: Whether the source quotes another paper or was extracted by a program.
        steps: Sampling steps, where they are not the recipe's.
        macs: Of a sample as the source counts them, in units of 10⁹.
        speedup: Over the reference of the same table.
        latency_s: Seconds as the source measured them.
        metrics: Numbers by name.
    """

    method: str
    source: str
    secondary: bool = False
    steps: int | None = None
    macs: float | None = None
    speedup: float | None = None
    latency_s: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A protocol.

    Args:
        title: For people.
        checkpoint: Folder or hub id of a diffusers pipeline; `None` = there is none, it must be given.
        pipeline: Class of the pipeline; `None` = any.
        dtype: Of the weights: a floating point type of torch.
        sampler: How it steps.
        samples: What is drawn.
        metric: What the published numbers are.
        calibration: What is learned from.
        published: What others reported.
        notes: What to know before comparing.
    """

    title: str
    dtype: str
    sampler: Sampler
    samples: Samples
    metric: Metric
    calibration: Calibration
    published: tuple[Published, ...]
    checkpoint: str | None = None
    pipeline: str | None = None
    notes: str = ""

    def sized(self, samples: int | None = None, calibration_samples: int | None = None) -> "Recipe":
        """The recipe with other numbers of samples; `None` = its own.

        Raises:
            InvalidRecipe: A number is less than one.
        """
        count = self.samples.count if samples is None else samples
        calibrated = self.calibration.samples if calibration_samples is None else calibration_samples
        sized = replace(
            self,
            samples=replace(self.samples, count=count),
            calibration=replace(self.calibration, samples=calibrated),
        )
        sized._check_numbers("asked for")
        return sized

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """From a TOML file.

        Raises:
            InvalidRecipe: The file cannot be read, is no TOML, lacks a key, or has one that no recipe has, or a value
                of another type or out of its range.
        """
        try:
            found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise _wrong(f"{path}: {error}", "a readable TOML file") from error
        recipe: Recipe = _read(cls, found, f"{path}: ")
        recipe._check_numbers(path)
        return recipe

    def _check_numbers(self, path: str | Path) -> None:
        counted = {
            "sampler.steps": self.sampler.steps - 1,  # one step has nothing to reuse
            "samples.count": self.samples.count,
            "samples.batch": self.samples.batch,
            "calibration.samples": self.calibration.samples,
            "calibration.batch": self.calibration.batch,
            "calibration.budgets": len(self.calibration.budgets),
        }
        for key, count in counted.items():
            if count < 1:
                raise _wrong(f"{path}: too small a {key}", "two steps or more, and at least one of everything else")
        for budget in self.calibration.budgets:
            if not 0 < budget <= 1:
                raise _wrong(f"{path}: budget {budget:g} in calibration.budgets", "a share of the MACs in (0, 1]")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise _wrong(f"{path}: dtype {self.dtype!r}", "float32, float16 or bfloat16")


def _read(kind: type[Any], found: Mapping[str, Any], where: str) -> Any:
    """A dataclass from a table of TOML; every key must be a field of it."""
    known, hints = {each.name: each for each in fields(kind)}, get_type_hints(kind)
    if unknown := sorted(found.keys() - known.keys()):
        raise _wrong(f"{where}unknown key {unknown[0]!r}", f"one of {', '.join(known)}")
    if missing := [name for name, each in known.items() if _needed(each) and name not in found]:
        raise _wrong(
            f"{where}no key {missing[0]!r}", f"all of {', '.join(n for n, each in known.items() if _needed(each))}"
        )
    return kind(**{name: _value(hints[name], value, f"{where}{name}") for name, value in found.items()})


def _needed(each: "Field[Any]") -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _value(kind: Any, value: Any, where: str) -> Any:
    """A value of a field's type."""
    kind = next((each for each in get_args(kind) if each is not NoneType), kind) if NoneType in get_args(kind) else kind
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        return _read(kind, value, f"{where}.")
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_value(get_args(kind)[0], each, f"{where}[{index}]") for index, each in enumerate(value))
    if get_origin(kind) is Mapping and isinstance(value, dict):
        return {name: _value(get_args(kind)[1], each, f"{where}.{name}") for name, each in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if kind is Any or type(value) is kind:
        return value
    expected = KINDS.get(kind) or ("a list" if get_origin(kind) is tuple else "a table")
    raise _wrong(f"{where} = {value!r}", expected)


def _wrong(given: str, expected: str) -> InvalidRecipe:
    return InvalidRecipe(given=given, expected=expected, advice="Correct the recipe; recipes/README.md has every key")
