"""`Order`: what a request asks for, and `Drawn`: what it gets."""

import io
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from stepmask.denoiser.conditioning import Conditioning
from stepmask.errors import InvalidConditioning, StepmaskError

FORMATS = {"png": "image/png", "npy": "application/x-npy"}


class Order(BaseModel):
    """What a request asks for: one run of a pipeline.

    Args:
        labels: One for each sample.
        prompts: One for each sample.
        samples: How many, of a pipeline that is told nothing.
        seed: Of the noise.
        tier: `None` = the server's.
        steps: `None` = the server's.
        guidance: Scale of the guidance; `None` = the pipeline's.
        fallback: Whether the bare pipeline draws what no table fits; `None` = as the server is set.
        format: "png" = the samples side by side; "npy" = numbers from 0 to 1, (samples, height, width, channels).
        id: By which it can be cancelled.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()
    samples: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    tier: str | None = None
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance: float | None = None
    fallback: bool | None = None
    format: Literal["png", "npy"] = "png"
    id: str = Field(default_factory=lambda: uuid4().hex, pattern=r"^[\w-]{1,64}$")

    @property
    def count(self) -> int:
        """How many samples are asked for."""
        return len(self.labels or self.prompts) or self.samples

    def told(self, pipe: Any) -> dict[str, Any]:
        """The arguments of a pipeline's call, but for its generator.

        Raises:
            InvalidConditioning: It takes something else, or has no such label.
        """
        guided = {} if self.guidance is None else {"guidance_scale": self.guidance}
        return {**self._conditioning(pipe).call(self.count, None), **guided, "num_inference_steps": self.steps}

    def _conditioning(self, pipe: Any) -> Conditioning:
        if self.labels:
            return Conditioning.labelled(pipe, self.labels)
        if self.prompts:
            return Conditioning.prompted(pipe, self.prompts)
        own = Conditioning.of(pipe)
        if own.argument == "batch_size":
            return own
        raise InvalidConditioning(
            given="neither labels nor prompts",
            expected=f"what a {type(pipe).__name__} is to draw, for each sample",
            advice="Ask with labels=[...] or prompts=[...], as the pipeline takes them",
        )

    @classmethod
    def first(cls, pipe: Any, steps: int, prompt: str | None) -> "Order":
        """One sample of what a pipeline is known to draw, or of a prompt: to warm it up with.

        Raises:
            InvalidConditioning: It takes prompts, and there is none beside it.
        """
        if prompt is not None:
            return cls(prompts=(prompt,), steps=steps)
        own = Conditioning.of(pipe)
        asked = {"class_labels": "labels", "prompt": "prompts"}.get(own.argument)
        return cls.model_validate({"steps": steps} if asked is None else {asked: own.choices[:1], "steps": steps})


@dataclass(frozen=True)
class Drawn:
    """What a run has drawn, and what it took.

    Args:
        pictures: Numbers from 0 to 1, of shape (samples, height, width, channels).
        tier: Under which it was drawn; "bare" = without a schedule.
        seconds: Of the pipeline's call.
        evaluations: Of the denoiser.
        macs_share: MACs of the denoiser that were computed, over those of the bare one.
        refusal: Why the bare pipeline has drawn it.
    """

    pictures: NDArray[np.float32]
    tier: str
    seconds: float
    evaluations: int
    macs_share: float
    refusal: StepmaskError | None = None

    def encoded(self, kind: Literal["png", "npy"]) -> bytes:
        """The pictures as the bytes of a file."""
        file = io.BytesIO()
        if kind == "npy":
            np.save(file, self.pictures)
            return file.getvalue()
        beside = np.concatenate(list(self.pictures), axis=1)
        grey_or_colour = beside[..., 0] if beside.shape[-1] == 1 else beside
        Image.fromarray((grey_or_colour * 255).round().astype(np.uint8)).save(file, "PNG")
        return file.getvalue()

    @property
    def headers(self) -> dict[str, str]:
        """What an answer tells of it."""
        told = {
            "X-Tier": self.tier,
            "X-Seconds": f"{self.seconds:.4f}",
            "X-Evaluations": str(self.evaluations),
            "X-Macs-Share": f"{self.macs_share:.4f}",
        }
        return told if self.refusal is None else {**told, "X-Fallback": type(self.refusal).__name__}
