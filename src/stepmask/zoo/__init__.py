"""Small trained pipelines that ship with the package, and the way from a name to a pipeline."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stepmask.errors import MissingExtra, PipelineNotFound

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

    Raises:
        PipelineNotFound: Nothing loadable is there.
        MissingExtra: diffusers is not installed, or transformers, for a pipeline with a text encoder.
    """
    place = folder(source.removeprefix("zoo:")) if source.startswith("zoo:") else source
    try:
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(place, **options)
    except (ImportError, AttributeError, RuntimeError) as error:  # diffusers says in many ways what it misses
        if missing := [package for package in ("diffusers", "transformers") if find_spec(package) is None]:
            raise _missing(missing[0]) from error
        raise
    except (OSError, ValueError) as error:
        raise PipelineNotFound(
            given=f"{source}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            expected="zoo:NAME, a diffusers folder, or a repository on the Hugging Face hub",
            advice=f"The zoo has {', '.join(f'zoo:{n}' for n in names())}",
        ) from error


def _missing(package: str) -> MissingExtra:
    return MissingExtra(
        given=f"no {package}", expected="it, to load the pipeline", advice="pip install 'stepmask[diffusers]'"
    )
