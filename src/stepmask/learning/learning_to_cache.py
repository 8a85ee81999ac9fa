"""Reads the routers of Learning-to-Cache (arXiv 2406.01733), as its DiT training saves them."""

import argparse
import pickle
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from stepmask.errors import InvalidScheduleFile, ScheduleMismatch
from stepmask.schedule.formats.bits import check_reused_by_output
from stepmask.schedule.schedule import MaskSchedule

SUBLAYERS = ("attn1", "ff")
"""The order of a block's two logits, by diffusers' names."""


def read(path: str | Path, reference: MaskSchedule, *, threshold: float = 0.5) -> MaskSchedule:
    """The table that a router file decides at a threshold.

    The file holds a logit for each sublayer at each step of the sampler, counted from the least noisy one. Steps go in
    pairs: the noisier of a pair computes everything, and the other computes a sublayer where sigmoid(logit) >
    threshold, and elsewhere takes what the sublayer said at the step before. The logits of the noisier steps are
    never trained and mean nothing.

    Args:
        path: A checkpoint with "routers". It is loaded as weights: of classes only its `argparse.Namespace` is let in.
        reference: Any table of a diffusers DiT, its sublayers as blocks, and of a sampler with as many steps; only its
            graph and fingerprints are used.
        threshold: In (0, 1): what Learning-to-Cache calls `--thres`. Its DiT-XL/2 routers at 256² are used with 0.1.

    Raises:
        InvalidScheduleFile: The file cannot be read, or holds no routers.
        ScheduleMismatch: It is for another number of steps or blocks.
        NoSuchBlock: The reference has not the sublayers of a DiT.
        InvalidSchedule: The reference does not reuse them by output.
    """
    scores = _scores(path)
    columns = _columns(reference)
    if scores.shape != (reference.steps, len(columns)) or reference.steps % 2:
        raise ScheduleMismatch(
            given=f"{path}: routers for {scores.shape[0]} steps and {scores.shape[1]} sublayers",
            expected=f"{reference.steps} steps, an even number, and {len(columns)} sublayers, as the reference has",
            advice="Read it with a reference of the denoiser and of as many steps as it was trained for",
        )
    computed = scores > threshold
    computed[1::2] = True
    rows = np.ones_like(reference.rows)
    rows[:, columns] = computed[::-1]
    return reference.with_rows(rows, provenance={"table": f"Learning-to-Cache, threshold {threshold:g}"})


def _scores(path: str | Path) -> npt.NDArray[np.float32]:
    """The sigmoid of the logits, shape (steps, sublayers), the least noisy step first."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            routers = torch.load(path, map_location="cpu", weights_only=True)["routers"]
        logits = torch.stack([routers[f"{step}.prob"] for step in range(len(routers))])
        return np.asarray(torch.sigmoid(logits).reshape(len(logits), -1).numpy())
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[:1] or [""]
        raise InvalidScheduleFile(
            given=f"{path}: {type(error).__name__}: {reason[0]}",
            expected='a checkpoint of Learning-to-Cache for DiT: "routers" with a tensor "STEP.prob" a step',
            advice="Give the file that its train_router.py wrote",
        ) from error


def _columns(reference: MaskSchedule) -> list[int]:
    """The sublayers of each block in the order of the logits."""
    graph = reference.graph
    depth = sum(name.endswith(f".{SUBLAYERS[0]}") for name in graph.names)
    names = [f"transformer_blocks.{block}.{sublayer}" for block in range(max(depth, 1)) for sublayer in SUBLAYERS]
    columns = [graph.column(name) for name in names]
    check_reused_by_output(graph, columns, "Learning-to-Cache")
    return columns
