"""The model card of a schedule, for people who find it on the Hugging Face hub."""

from contextlib import suppress
from typing import Any

from stepmask.drawing import encoded
from stepmask.errors import MissingExtra
from stepmask.schedule.file import FILE_NAME, TENSORS_NAME
from stepmask.schedule.schedule import MaskSchedule
from stepmask.schedule.show import summary

PICTURE = "schedule.png"


def files(schedule: MaskSchedule, repo_id: str, *, measured: str = "", **metadata: Any) -> dict[str, bytes]:
    """What a repository holds: the schedule, its card, and a picture if matplotlib is installed."""
    tensors = schedule.to_safetensors()
    found = {FILE_NAME: schedule.to_json().encode(), **({} if tensors is None else {TENSORS_NAME: tensors})}
    with suppress(MissingExtra):
        found[PICTURE] = encoded(schedule.plot(), "png")
    text = card(schedule, repo_id, measured=measured, pictured=PICTURE in found, **metadata)
    return {**found, "README.md": text.encode()}


def card(schedule: MaskSchedule, repo_id: str, *, measured: str = "", pictured: bool = False, **metadata: Any) -> str:
    """README.md of a repository that holds a schedule.

    Args:
        schedule: The schedule.
        repo_id: Of the repository, to be shown in the example.
        measured: A table of what was measured, in Markdown: `report.to_markdown()`.
        pictured: Whether `schedule.png` lies beside it.
        **metadata: Of `huggingface_hub.ModelCardData`: base_model, license, tags and so on.
    """
    from huggingface_hub import ModelCardData

    tags = ["stepmask", "diffusers", *metadata.pop("tags", [])]
    data = ModelCardData(library_name="stepmask", tags=tags, **metadata)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# A mask schedule for {schedule.denoiser.class_name}, {schedule.steps} steps",
        "\n".join(f"- {line}" for line in summary(schedule).splitlines()),
        *([f"![what is computed at each step]({PICTURE})"] if pictured else []),
        "## Use",
        f"```python\n{_example(schedule, repo_id, metadata.get('base_model'))}```",
        f"The sampler is `{schedule.sampler.class_name}` with {schedule.steps} timesteps; another one is refused.",
        *(["## Measured", measured] if measured else []),
    ]
    return "\n\n".join(parts) + "\n"


def _example(schedule: MaskSchedule, repo_id: str, base_model: object) -> str:
    load = f'DiffusionPipeline.from_pretrained("{base_model}")' if isinstance(base_model, str) else "...  # yours"
    return (
        "import stepmask\n"
        f"{'from diffusers import DiffusionPipeline' * isinstance(base_model, str)}\n"
        f"pipe = {load}\n"
        f'schedule = stepmask.MaskSchedule.from_pretrained("{repo_id}")\n'
        "with stepmask.apply(pipe, schedule):\n"
        f"    images = pipe(..., num_inference_steps={schedule.steps}).images\n"
    )
