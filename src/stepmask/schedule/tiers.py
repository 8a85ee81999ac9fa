"""`Tiers`: schedules of one denoiser by name, to switch between at run time, each with tables for its numbers of steps.

On disk a tier is a folder of the folder: the schedule itself, or a folder for each of its tables.

    folder/fast/stepmask.json
    folder/quality/20-steps/stepmask.json
    folder/quality/50-steps/stepmask.json

A reader takes the names of tiers from their folders, and asks nothing of the names below.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from stepmask.errors import HubError, InvalidSchedule, InvalidScheduleFile, UnwritablePath
from stepmask.files import as_path, clear_leftovers, write_together
from stepmask.hub import Source
from stepmask.schedule.file import FILE_NAME, TENSORS_NAME, contents
from stepmask.schedule.limits import MAX_TABLES
from stepmask.schedule.schedule import MaskSchedule
from stepmask.text import told

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,62}[A-Za-z0-9])?")
"""A tier's name: it becomes that of a folder, on any system."""


class Tiers(Mapping[str, tuple[MaskSchedule, ...]]):
    """Schedules of one denoiser by name: what a pipeline may follow, such as "fast" and "quality".

        tiers = stepmask.Tiers({"fast": half, "quality": [at_20_steps, at_50_steps]})
        masked = stepmask.apply(pipe, tiers, tier="fast")
        masked.switch("quality")

    A tier has one table, or several for several numbers of steps or samplers: each run follows the one that fits it.

    Args:
        tiers: A schedule, or several, by the tier's name: letters, digits, and `-`, `_`, `.` between them.

    Raises:
        InvalidSchedule: There is none, a name is none or differs from another one in case only, schedules are of
            several denoisers or graphs, or a run could follow two of a tier.
    """

    def __init__(self, tiers: Mapping[str, MaskSchedule | Sequence[MaskSchedule]]) -> None:
        self._tables = {
            name: (given,) if isinstance(given, MaskSchedule) else tuple(given) for name, given in tiers.items()
        }
        _check_names(self._tables)
        _check_count(sum(map(len, self._tables.values())))
        _check_one_denoiser(self._tables)
        for name, tables in self._tables.items():
            _check_apart(name, tables)

    def __getitem__(self, name: str) -> tuple[MaskSchedule, ...]:
        """The tables of a tier."""
        return self._tables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)

    def __repr__(self) -> str:
        told = (f"{name}: {', '.join(map(repr, tables))}" for name, tables in self.items())
        return f"Tiers({'; '.join(told)})"

    def save_pretrained(self, folder: str | bytes | Path) -> Path:
        """Write `folder/TIER/stepmask.json`, or `folder/TIER/20-steps/stepmask.json`, … of a tier with several tables.

        Returns:
            The folder.

        Raises:
            UnwritablePath: The folder cannot be written, or has other schedules, which a reader would take for tiers.
        """
        folder = as_path(folder)
        places = {folder / place: table for place, table in _layout(self._tables)}
        _check_free(folder, places)
        files: dict[Path, str | bytes] = {}
        for place, table in places.items():
            clear_leftovers(place)
            own = contents(table.to_json(), table.to_safetensors())
            files.update({place / name: content for name, content in own.items()})
        write_together(files)
        return folder

    @classmethod
    def from_pretrained(
        cls,
        source: str | bytes | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "Tiers":
        """Read tiers from a folder, or from a repository on the Hugging Face hub that has the same files.

        Folders whose names begin with a dot, and files beside those of tiers, are not looked at.

        Args:
            source: A path, or the id of a repository. A path that exists goes first.
            revision: Branch, tag or commit of the repository; `None` = its main branch.
            token: To read it with; `None` = the one that this machine is logged in with, `False` = none.
            cache_dir: Where downloads are kept; `None` = where huggingface_hub keeps all of them.
            local_files_only: Take what was downloaded before, and ask the network for nothing.

        Raises:
            InvalidScheduleFile: There is no such folder or repository, it has no tiers, or a folder that is none; a
                file is no schedule, or schedules do not belong together.
        """
        place = os.fsdecode(source)
        try:
            folder = Source(place, revision, token, cache_dir, local_files_only).folder([FILE_NAME, TENSORS_NAME])
            found = {path.name: _tables_in(place, path) for path in _folders(place, folder)}
            _check_count(sum(map(len, found.values())))
            return cls({name: [*map(MaskSchedule.from_pretrained, paths)] for name, paths in found.items()})
        except InvalidScheduleFile:
            raise
        except (HubError, InvalidSchedule) as error:
            raise InvalidScheduleFile(**error.parts) from error
        except OSError as error:
            raise _no_tiers(place, str(error)) from error


def _layout(tiers: Mapping[str, Sequence[MaskSchedule]]) -> Iterator[tuple[Path, MaskSchedule]]:
    """Where each table lies, below the folder of all."""
    for name, tables in tiers.items():
        if len(tables) == 1:
            yield Path(name), tables[0]
            continue
        counts = [table.steps for table in tables]
        taken: set[str] = set()
        for table in tables:
            alone = counts.count(table.steps) == 1
            base = f"{table.steps}-steps" if alone else f"{table.steps}-steps-{table.sampler.class_name or 'loop'}"
            chosen = base
            while chosen in taken:
                chosen = f"{base}-{len(taken) + 1}"
            taken.add(chosen)
            yield Path(name, chosen), table


def _folders(source: str, folder: Path) -> list[Path]:
    """The folders of tiers.

    Raises:
        InvalidScheduleFile: There is none, or the folder is a single schedule's.
        OSError: It is no folder.
    """
    if (folder / FILE_NAME).exists():
        raise _no_tiers(source, f"{FILE_NAME} itself, which is one schedule: MaskSchedule.from_pretrained reads it")
    found = _visible(folder)
    if not found:
        raise _no_tiers(source, "no folder in it")
    return found


def _tables_in(source: str, tier: Path) -> list[Path]:
    """The folders of a tier's tables: itself, or those in it.

    Raises:
        InvalidScheduleFile: It has none, or both.
    """
    inside = [path for path in _visible(tier) if (path / FILE_NAME).exists()]
    if (tier / FILE_NAME).exists():
        if inside:
            raise _no_tiers(source, f"{FILE_NAME} both in {tier.name!r} and in its folder {inside[0].name!r}")
        return [tier]
    if not inside:
        raise _no_tiers(source, f"no {FILE_NAME} in its folder {told(tier.name)}")
    return inside


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _check_free(folder: Path, places: Iterable[Path]) -> None:
    """Refuse a folder that has other schedules than those to be written."""
    allowed = {place / FILE_NAME for place in places}
    there = [path for depth in ("", "*", "*/*") for path in folder.glob(f"{depth}/{FILE_NAME}".lstrip("/"))]
    other = next((path for path in there if path not in allowed), None)
    if other is not None:
        raise UnwritablePath(
            given=f"cannot write tiers to {folder}, in which {other.relative_to(folder)} lies",
            expected="a folder without other schedules, for a reader would take them for tiers",
            advice="Choose another folder, or remove it first",
        )


def _check_names(names: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or NAME.fullmatch(name) is None:
            raise _invalid(
                f"a tier called {told(name)}",
                "at most 64 letters, digits, '-', '_' and '.', with a letter or a digit at both ends",
                "Rename it: its name is that of a folder",
            )
        if name.lower() in seen:
            raise _invalid(
                f"tiers called {seen[name.lower()]!r} and {name!r}",
                "names that differ in more than case: some systems take them for one folder",
                "Rename one of them",
            )
        seen[name.lower()] = name
    if not seen:
        raise _invalid("no tiers", "at least one", 'Give a schedule by its name: Tiers({"fast": schedule})')


def _check_count(tables: int) -> None:
    if tables > MAX_TABLES:
        raise _invalid(f"{tables} tables", f"at most {MAX_TABLES}", "Keep those that you use")


def _check_one_denoiser(tiers: Mapping[str, Sequence[MaskSchedule]]) -> None:
    """Refuse a tier without tables, and tables that are not of one denoiser and one graph; times may differ."""
    first: MaskSchedule | None = None
    for name, tables in tiers.items():
        if not tables or not all(isinstance(table, MaskSchedule) for table in tables):
            raise _invalid(
                f"tier {name!r} with {told(tables[0]) if tables else 'no table'}",
                "a MaskSchedule, or several",
                "Give what learn or MaskSchedule.from_pretrained returned",
            )
        for table in tables:
            first = first or table
            if not first.is_like(table):
                raise _invalid(
                    f"tier {name!r} with {table!r}, which is of another denoiser or graph than {first!r}",
                    "schedules of one denoiser, over the same blocks as they were traced",
                    "Trace the denoiser once, at one size, and learn all schedules from that graph; make several "
                    "Tiers of several denoisers",
                )


def _check_apart(name: str, tables: Sequence[MaskSchedule]) -> None:
    """Refuse two tables that a run could follow: of the same steps, or one of them for a part of the other's."""
    for one, other in combinations(tables, 2):
        if one.sampler.is_within(other.sampler) or other.sampler.is_within(one.sampler):
            raise _invalid(
                f"tier {name!r} with two tables for the same run: {one.steps} and {other.steps} steps of a "
                f"{one.sampler.class_name or 'loop'}, one of which has the other's timesteps",
                "one table for each number of steps and sampler",
                "Make a tier of its own of one of them",
            )


def _invalid(given: str, expected: str, advice: str) -> InvalidSchedule:
    return InvalidSchedule(given=given, expected=expected, advice=advice)


def _no_tiers(source: str, problem: str) -> InvalidScheduleFile:
    return InvalidScheduleFile(
        given=f"{source}: {problem}",
        expected=f"a folder for each tier, with {FILE_NAME} or a folder for each of its tables in it",
        advice="Write tiers with Tiers(...).save_pretrained, or schedules with save_pretrained into such folders",
    )
