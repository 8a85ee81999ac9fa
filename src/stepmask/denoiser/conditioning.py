"""`Conditioning`: what a pipeline is told to draw, labels or prompts, dealt out to the samples of a run."""

import inspect
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stepmask.denoiser.families import denoiser_of
from stepmask.errors import InvalidConditioning

PROMPTS_NAME = "prompts.txt"
"""Beside a pipeline's model_index.json: prompts that it was trained for."""


@dataclass(frozen=True)
class Conditioning:
    """An argument of a pipeline that takes one label or prompt per sample, and those to draw from.

        told = Conditioning.prompted(pipe, read_prompts("prompts.txt"))
        trajectory = stepmask.record(pipe, seed=3, **told.call(8, seed=3), num_inference_steps=20)

    Args:
        argument: "class_labels" or "prompt"; "batch_size" for pipelines that are told nothing.
        choices: Labels or prompts; none for a batch size.
        fixed: Further arguments of every call.
    """

    argument: str
    choices: tuple[Any, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def call(self, count: int, seed: int | None) -> dict[str, Any]:
        """Arguments for `count` samples, without replacement while the choices last; in their order without a seed."""
        if not self.choices:
            return {self.argument: count, **self.fixed}
        chosen = list(self.choices) if seed is None else random.Random(seed).sample(self.choices, len(self.choices))
        return {self.argument: [chosen[index % len(chosen)] for index in range(count)], **self.fixed}

    @classmethod
    def of(cls, pipe: Any) -> "Conditioning":
        """A pipeline's own: the labels that it names, the prompts that lie beside it, or none if it needs none.

        Raises:
            InvalidConditioning: It must be told something that is not known here.
        """
        wanted = _arguments(pipe)
        if "class_labels" in wanted:
            return cls("class_labels", tuple(_known_labels(pipe)))
        folder = getattr(pipe, "name_or_path", None)
        if "prompt" in wanted and folder and (beside := Path(folder) / PROMPTS_NAME).is_file():
            return cls.prompted(pipe, read_prompts(beside))
        required = [p.name for p in wanted.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if "batch_size" in wanted and not required:
            return cls("batch_size")
        raise InvalidConditioning(
            given=f"a {type(pipe).__name__} without arguments",
            expected=f"what it is to draw, as {type(pipe).__name__} takes it",
            advice='Pass it, on the command line with --prompts FILE or --call \'{"prompt": ["a cat", "a dog"]}\'',
        )

    @classmethod
    def labelled(cls, pipe: Any, labels: Sequence[int]) -> "Conditioning":
        """Class labels to draw from.

        Raises:
            InvalidConditioning: The pipeline takes no labels, or one is out of its range.
        """
        _check_takes(pipe, "class_labels", "labels")
        known = _known_labels(pipe)
        if not labels or not set(labels) <= set(known):
            unknown = sorted(set(labels) - set(known))
            raise InvalidConditioning(
                given=f"label {unknown[0]}" if unknown else "no label",
                expected=f"labels of {type(pipe).__name__}, from {known[0]} to {known[-1]}",
                advice="Check the labels",
            )
        return cls("class_labels", tuple(labels))

    @classmethod
    def prompted(cls, pipe: Any, prompts: Sequence[str]) -> "Conditioning":
        """Prompts to draw from.

        Raises:
            InvalidConditioning: The pipeline takes no prompts, or there is none.
        """
        _check_takes(pipe, "prompt", "prompts")
        if not prompts:
            raise InvalidConditioning(given="no prompt", expected="at least one", advice="Write one to a line")
        return cls("prompt", tuple(prompts), _fixed(pipe))


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one to a line; empty lines do not count.

    Raises:
        InvalidConditioning: The file cannot be read, is not UTF-8, or holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _no_prompts(f"{path}: {error}") from error
    if prompts := [line.strip() for line in lines if line.strip()]:
        return prompts
    raise _no_prompts(f"{path}, which is empty")


def read_labels(text: str) -> list[int]:
    """Labels as people write them: "0-4,8" is [0, 1, 2, 3, 4, 8].

    Raises:
        InvalidConditioning: It is not written so.
    """
    labels: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if span is None or int(span[2] or span[1]) < int(span[1]):
            raise InvalidConditioning(
                given=f"labels {text!r}", expected="numbers and ascending ranges", advice="Write them like 0-4,8"
            )
        labels += range(int(span[1]), int(span[2] or span[1]) + 1)
    return labels


def _arguments(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipe.__call__).parameters


def _known_labels(pipe: Any) -> list[int]:
    """The labels that a pipeline names, or all that its denoiser has a place for."""
    if named := set(getattr(pipe, "labels", {}).values()):
        return sorted(named)
    return list(range(getattr(denoiser_of(pipe).config, "num_embeds_ada_norm", None) or 1000))


def _fixed(pipe: Any) -> dict[str, Any]:
    """What PixArt's pipelines must be told besides: without two packages they warn at every call."""
    takes = "clean_caption" in _arguments(pipe)
    return {"clean_caption": False} if takes and not all(map(find_spec, ("bs4", "ftfy"))) else {}


def _check_takes(pipe: Any, argument: str, what: str) -> None:
    if argument not in _arguments(pipe):
        raise InvalidConditioning(
            given=f"{what} for a {type(pipe).__name__}, which takes none",
            expected=f"one of its arguments: {', '.join(_arguments(pipe))}",
            advice="Leave them out, or pass arguments by name",
        )


def _no_prompts(given: str) -> InvalidConditioning:
    return InvalidConditioning(
        given=given, expected="a UTF-8 text file with a prompt to a line", advice="Check the file"
    )
