"""The README.md of a schedule's repository on the hub."""

import json

from stepmask.hub import Card
from stepmask.schedule.schedule import MaskSchedule
from stepmask.schedule.show import summary


def readme(schedule: MaskSchedule, repo_id: str, card: Card) -> str:
    """What a schedule is for, what it spends, and how to put it on."""
    denoiser = schedule.denoiser.class_name
    about = (
        f"A mask schedule for {denoiser}: which blocks to compute at each step of sampling, and which to answer from "
        f"the store. It holds for its denoiser, its sampler and its timesteps, and is refused for others.\n\n"
        f"```\n{summary(schedule)}\n```"
    )
    tags = ("diffusion", "mask-schedule", denoiser)
    return card.markdown(repo_id.rpartition("/")[2], tags=tags, about=about, code=_code(schedule, repo_id, card))


def _code(schedule: MaskSchedule, repo_id: str, card: Card) -> str:
    sampler = schedule.sampler.class_name
    load = f"schedule = stepmask.MaskSchedule.from_pretrained({json.dumps(repo_id)})"
    put_on = "masked = stepmask.apply(pipe, schedule)  # masked.remove() takes it off"
    if card.base_model is None:
        sampled = f", sampled by {sampler}" if sampler else ""
        given = f"# pipe: with a {schedule.denoiser.class_name}{sampled} in {schedule.steps} steps"
        return "\n".join(["import stepmask", "", given, load, put_on])
    pipe = f"pipe = diffusers.DiffusionPipeline.from_pretrained({json.dumps(card.base_model)})"
    scheduler = [f"pipe.scheduler = diffusers.{sampler}.from_config(pipe.scheduler.config)"] if sampler else []
    return "\n".join(["import diffusers", "import stepmask", "", pipe, *scheduler, load, put_on])
