"""Small trained pipelines that ship with the package, and the way from a name to a pipeline."""

import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stepmask.errors import NoSuchSampler, PipelineNotFound
from stepmask.extras import missing

_HERE = Path(__file__).parent


def names() -> list[str]:
    """Names of the pipelines that ship with the package."""
    return sorted(path.parent.name for path in _HERE.glob("*/model_index.json"))


def folder(name: str) -> Path:
    """The folder of a pipeline that ships with the package, as `DiffusionPipeline.from_pretrained` takes it.

    Raises:
        PipelineNotFound: There is none of that name.
    """
    if name not in names():
        raise PipelineNotFound(
            given=f"zoo:{name}", expected=f"one of {', '.join(f'zoo:{n}' for n in names())}", advice="Check the name"
        )
    return _HERE / name


def load(source: str, **options: Any) -> Any:
    """A pipeline by "zoo:NAME", folder, or hub id; options go to `DiffusionPipeline.from_pretrained`.

    A PixArt of a size for which diffusers knows no aspect ratios draws at that size, without being told.

    Raises:
        PipelineNotFound: Nothing loadable is there.
        MissingExtra: diffusers is not installed, or transformers, for a pipeline with a text encoder.
    """
    place = folder(source.removeprefix("zoo:")) if source.startswith("zoo:") else source
    try:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(place, **options)
    except (ImportError, AttributeError, RuntimeError) as error:  # diffusers says in many ways what it misses
        if absent := [package for package in ("diffusers", "transformers") if find_spec(package) is None]:
            raise missing("diffusers", absent[0], "loading pipelines") from error
        raise
    except (OSError, ValueError) as error:
        raise PipelineNotFound(
            given=f"{source}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            expected="zoo:NAME, a diffusers folder, or a repository on the Hugging Face hub",
            advice=f"The zoo has {', '.join(f'zoo:{n}' for n in names())}",
        ) from error
    return _at_its_own_size(pipe)


def _at_its_own_size(pipe: Any) -> Any:
    """A PixArt that looks for aspect ratios only where there are any; any other pipeline as it is."""
    if not type(pipe).__name__.startswith("PixArt"):
        return pipe
    from stepmask.zoo.pixart import at_its_own_size

    return at_its_own_size(pipe)


def set_sampler(pipe: Any, name: str, options: Mapping[str, Any]) -> None:
    """Give a pipeline another sampler, with the noise schedule that it was trained with.

    Args:
        pipe: The pipeline.
        name: Class name of a scheduler of diffusers.
        options: Of the scheduler, over those of the pipeline's own.

    Raises:
        NoSuchSampler: There is none of that name, or it does not take an option.
    """
    import diffusers

    kind: Any = getattr(diffusers, name, None)
    is_scheduler = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    if not is_scheduler:
        raise NoSuchSampler(
            given=f"sampler {name!r}", expected="the class name of a scheduler of diffusers", advice="Check the name"
        )
    taken = [each for each in inspect.signature(kind).parameters if each != "kwargs"]
    if unknown := sorted(options.keys() - set(taken)):
        raise NoSuchSampler(
            given=f"option {unknown[0]!r} of {name}", expected=f"one of {', '.join(taken)}", advice="Check the option"
        )
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
