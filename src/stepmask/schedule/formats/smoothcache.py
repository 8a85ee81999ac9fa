"""SmoothCache's schedule file (arXiv 2411.10510): of each kind of sublayer a list with a number a step, 1 = compute.

    {"attn1": [1, 0, 1], "ff-0": [1, 0, 0]}

A name is that of a sublayer in a transformer block, of all blocks or, with "-INDEX", of one, which goes first. What
is not listed is computed. Files for the DiT repository say "attn" and "mlp" for what diffusers calls "attn1" and "ff".
SmoothCache's `DiffuserCacheHelper` follows the lists of the sublayers in its `components_to_wrap`, at first "attn1".
"""

from collections.abc import Mapping, Sequence

import numpy as np

from stepmask.errors import InvalidSchedule, NoSuchBlock
from stepmask.schedule.formats.bits import check_reused_by_output, plain_rows, to_bits
from stepmask.schedule.schedule import MaskSchedule

DIT_NAMES = {"attn1": "attn", "ff": "mlp"}
"""What the DiT repository calls the sublayers of diffusers' blocks."""


def read(lists: Mapping[str, Sequence[int]], reference: MaskSchedule) -> MaskSchedule:
    """The table of a schedule file.

        table = read(json.loads(Path("50-N-3-threshold-0.08.json").read_text(encoding="utf-8")), reference)

    Args:
        lists: The file's JSON: a 0 or 1 a step, noisiest first, by name.
        reference: Any table of the denoiser, its sublayers as blocks, and of the sampler; only its graph and
            fingerprints are used.

    Raises:
        InvalidSchedule: A list has another number of steps or values other than 0 and 1, or a listed block is not
            reused by output.
        NoSuchBlock: A name is that of no block.
        ReuseBeforeCompute: A list begins with 0.
    """
    rows = np.ones_like(reference.rows)
    names = [_names(block) for block in reference.graph.names]
    _check_known(lists, names)
    for column, own in enumerate(names):
        if name := next(filter(lists.__contains__, own), None):
            check_reused_by_output(reference.graph, [column], "SmoothCache")
            rows[:, column] = to_bits(lists[name], reference.steps, name)
    return reference.with_rows(rows, provenance={"table": "SmoothCache"})


def write(schedule: MaskSchedule) -> dict[str, list[int]]:
    """The JSON of the file: a list for each kind of sublayer, or for each sublayer where those of a kind differ.

    Raises:
        InvalidSchedule: The schedule has forecasts, reuses the denoiser's own output or a block that is no sublayer
            or not reused by output, or two blocks that SmoothCache cannot tell apart differ.
    """
    rows, graph = plain_rows(schedule, "SmoothCache"), schedule.graph
    check_reused_by_output(graph, np.flatnonzero(~rows.all(axis=0)).tolist(), "SmoothCache")
    kinds: dict[str, dict[str, list[int]]] = {}
    for name, bits in zip(graph.names, rows.T.astype(int).tolist(), strict=True):
        if len(own := _names(name)) < 2:
            _check_computed(bits, name or "(denoiser)")
            continue
        one = kinds.setdefault(own[1], {})
        if one.setdefault(own[0], bits) != bits:
            raise _no_word(f"{name!r}, beside another block that is {own[0]!r} there, too")
    return {name: bits for kind, one in kinds.items() for name, bits in _merged(kind, one).items()}


def _names(block: str) -> list[str]:
    """What a file may call a block, the most particular first; nothing of one that is no sublayer."""
    *_, index, kind = ("", *block.split("."))
    if not index.isdigit():
        return []
    return [name for word in (kind, DIT_NAMES.get(kind)) if word for name in (f"{word}-{index}", word)]


def _check_known(lists: Mapping[str, Sequence[int]], names: list[list[str]]) -> None:
    kinds = dict.fromkeys(own[1] for own in names if own)
    if unknown := lists.keys() - {name for own in names for name in own}:
        raise NoSuchBlock(
            given=f"SmoothCache's list {sorted(unknown)[0]!r}",
            expected=f"sublayers of the reference ({', '.join(kinds) or 'it has none'})",
            advice='Trace the denoiser with granularity="sublayer"',
        )


def _merged(kind: str, one: dict[str, list[int]]) -> dict[str, list[int]]:
    """One list for all blocks of a kind, if they agree."""
    first, *others = one.values()
    return {kind: first} if all(bits == first for bits in others) else one


def _check_computed(bits: Sequence[int], label: str) -> None:
    if not all(bits):
        raise _no_word(f"{label}, which is reused")


def _no_word(what: str) -> InvalidSchedule:
    return InvalidSchedule(
        given=f"a schedule with {what}",
        expected="sublayers of numbered blocks, such as transformer_blocks.0.attn1: SmoothCache names no others",
        advice='Trace the denoiser with granularity="sublayer", and learn or choose a table of these',
    )
