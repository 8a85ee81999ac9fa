"""`Settings`: what a server is started with."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

from stepmask.zoo.loading import Loading


@dataclass(frozen=True)
class Settings:
    """What a server is started with.

    Args:
        pipeline: "zoo:NAME", a folder, or a hub id.
        tiers: A folder or a hub id of the tiers.
        tier: Of requests that name none; `None` = the first.
        steps: Of requests that name none; the speed-up is told for them.
        pipelines: How many draw side by side, each in a thread of its own, all over the same weights.
        waiting: The most requests that wait; further ones are turned away.
        samples: The most samples of one request.
        prompt: Drawn once at start-up, by pipelines without a file of prompts beside them.
        falls_back: Whether a run that no table fits is drawn by the bare pipeline, where the request does not say.
        loading: The device, the dtype, and where the weights come from.
    """

    pipeline: str
    tiers: str
    tier: str | None = None
    steps: int = 20
    pipelines: int = 1
    waiting: int = 32
    samples: int = 4
    prompt: str | None = None
    falls_back: bool = False
    loading: Loading = field(default_factory=Loading)


@dataclass(frozen=True)
class Address:
    """Where a server listens, and for how many seconds it finishes requests once it was told to stop."""

    host: str
    port: int
    grace: int


def parse(arguments: Sequence[str] | None = None) -> tuple[Settings, Address]:
    """What a command line says."""
    parser = argparse.ArgumentParser(
        "serve", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("pipeline", help="zoo:NAME, a folder, or a hub id")
    parser.add_argument("tiers", help="a folder or a hub id of tiers")
    parser.add_argument("--tier", help="of requests that name none; by itself the first")
    parser.add_argument("--steps", type=_count, default=20, help="of requests that name none")
    parser.add_argument("--pipelines", type=_count, default=1, help="how many draw side by side")
    parser.add_argument("--waiting", type=_count, default=32, help="the most requests that wait")
    parser.add_argument("--samples", type=_count, default=4, help="the most samples of one request")
    parser.add_argument("--prompt", help="drawn once at start-up, by pipelines without a file of prompts beside them")
    parser.add_argument("--fall-back", action="store_true", help="draw with the bare pipeline what no table fits")
    parser.add_argument("--device", help="of torch")
    parser.add_argument("--dtype", help="of the weights")
    parser.add_argument("--variant", help="of the files of the weights")
    parser.add_argument("--revision", help="of a repository on the hub")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--grace", type=_count, default=30, help="seconds to finish requests in when told to stop")
    told = parser.parse_args(arguments)
    settings = Settings(
        told.pipeline,
        told.tiers,
        told.tier,
        told.steps,
        told.pipelines,
        told.waiting,
        told.samples,
        told.prompt,
        told.fall_back,
        Loading(told.device, told.dtype, told.variant, told.revision),
    )
    return settings, Address(told.host, told.port, told.grace)


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is not at least 1")
    return count
