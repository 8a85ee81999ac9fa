"""Where learners start: tables by hand, and that all of them fit their budget."""

import numpy as np
import pytest

from stepmask import MaskSchedule
from stepmask.errors import InvalidBudget
from stepmask.learning.profile import Profile
from stepmask.learning.starts import families, filled_interval, groups, refreshed_interval
from stepmask.schedule.budget import Budget
from stepmask.schedule.fingerprint import DenoiserFingerprint
from stepmask.schedule.graph import DENOISER, Block, BlockGraph
from stepmask.schedule.rectify import lower

from toys import chain_graph, sampler, stepped_unet

NAMES = ("layers.0.attn", "layers.0.ff", "layers.1.attn", "layers.1.ff")


def transformer(steps: int, glue: int = 0) -> MaskSchedule:
    """The all-compute table of two layers on a residual stream, a MAC and four bytes a block."""
    blocks = [Block(name, NAMES[:column], "output", 1, ((1,),), 4) for column, name in enumerate(NAMES)]
    graph = BlockGraph((*blocks, Block(DENOISER, NAMES, "output", glue, ((1,),), 4)))
    return MaskSchedule.all_compute(graph, DenoiserFingerprint("Toy"), sampler(steps))


class TestRefreshedInterval:
    def test_by_hand(self) -> None:
        # 6 of 12 evaluations: 5 whole, and 1 left = two times both attentions, midway in the first two gaps
        table = refreshed_interval(transformer(12), Budget(macs=0.5), [0, 2], 5, 6, order=1)
        assert table is not None
        assert np.flatnonzero(table.rows[:, 1]).tolist() == [0, 2, 5, 8, 10]
        assert np.flatnonzero(table.rows[:, 0]).tolist() == [0, 1, 2, 4, 5, 8, 10]
        assert lower(table).macs_share == pytest.approx(0.5)
        # step 6: attn was computed at 5 and 4, ff at 5 and 2
        assert table.forecasts[6, :2].tolist() == [[2, -1, 0], [pytest.approx(4 / 3), pytest.approx(-1 / 3), 0]]

    def test_the_last_blocks_come_first_where_the_budget_ends(self) -> None:
        table = refreshed_interval(transformer(12), Budget(macs=0.5 - 1 / 48), [0, 2], 5, 6, order=1)
        assert table is not None
        assert table.rows[4].tolist() == [False, False, True, False, True]

    def test_none_where_not_one_partial_evaluation_is_left(self) -> None:
        assert refreshed_interval(transformer(12), Budget(macs=0.5), [0, 2], 6, 6, order=1) is None


class TestFilledInterval:
    @pytest.mark.parametrize(("last_first", "row"), [(True, "01111"), (False, "11101")])
    def test_by_hand(self, last_first: bool, row: str) -> None:
        # 23 cells of 48: six evaluations of four blocks, but for one block at step 6, the fourth of them
        table = filled_interval(transformer(12), Budget(macs=23 / 48), 6, 3, last_first=last_first, order=1)
        assert table is not None
        assert np.flatnonzero(table.rows[:, 1]).tolist() == [0, 2, 4, 6, 8, 10]
        assert "".join("01"[bit] for bit in table.rows[6].astype(int)) == row
        assert lower(table).macs_share == pytest.approx(23 / 48)
        missing = row.index("0")
        assert table.forecasts[6, missing].tolist() == [2, -1, 0]  # of steps 4 and 2
        assert table.forecasts[7, missing].tolist() == [2.5, -1.5, 0]

    def test_none_where_not_one_block_is_left(self) -> None:
        assert filled_interval(transformer(12), Budget(macs=20 / 48), 6, 3, last_first=True, order=1) is None

    def test_glue_alone_does_not_keep_an_evaluation_out(self) -> None:
        # four MACs of blocks and one of glue a step: five of ten whole evaluations are 30 of 50, and 29 fit
        names = [
            table.provenance["table"]
            for family in families(transformer(10, glue=1), Budget(macs=29 / 50), window=2)
            for table in family.tables
        ]
        assert "interval of 5 evaluations, 3 blocks at step 2, Taylor 1" in names


class TestGroups:
    def test_blocks_of_one_kind_have_one_name(self) -> None:
        assert groups(transformer(4).graph) == {"attn": [0, 2], "ff": [1, 3]}

    def test_none_where_all_are_of_one_kind(self) -> None:
        graph = BlockGraph((Block("layers.0"), Block("layers.1"), Block(DENOISER)))
        assert groups(graph) == {}


def moving_until(step: int) -> Profile:
    """Of `transformer(8)`: what blocks say takes a random walk up to a step, and stays as it is from then on."""
    reference, ages, rows = transformer(8), 6, 16
    walk = np.random.default_rng(0).normal(size=(rows, 8, len(reference.graph)))
    walk[:, step + 1 :] = 0
    said = walk.cumsum(axis=1)
    inner = np.zeros((rows, 8, len(reference.graph), ages + 1))
    for age in range(ages + 1):
        inner[:, age:, :, age] = said[:, : 8 - age]
    return Profile(reference, inner, inner, np.zeros(rows), np.arange(rows))


class TestFamilies:
    @pytest.mark.parametrize("share", [0.15, 0.25, 0.35, 0.5, 0.6, 0.9])
    @pytest.mark.parametrize("glue", [0, 1])
    def test_all_tables_fit(self, share: float, glue: int) -> None:
        budget = Budget(macs=share)
        found = families(transformer(20, glue), budget, window=3)
        assert found
        assert all(budget.allows(lower(table)) for family in found for table in family.tables)
        assert all(table.windows.max() <= family.window <= 3 for family in found for table in family.tables)

    def test_a_unet_may_start_near_its_output(self) -> None:
        # a third of a step at branch 0: four whole steps and eight such are 20 of 36, five and seven would be 22
        found = families(stepped_unet(12), Budget(macs=0.6), window=3)
        names = {table.provenance["table"] for family in found for table in family.tables}
        assert {name for name in names if "DeepCache" in name} == {
            "DeepCache, interval 3, branch 0, Taylor 1",
            "DeepCache, interval 3, branch 0, Taylor 2",
        }

    def test_a_small_store_leaves_what_reads_less(self) -> None:
        reference = MaskSchedule.all_compute(chain_graph(2, "output"), DenoiserFingerprint("Toy"), sampler(8))
        for family in families(reference, Budget(macs=0.5, store_bytes=8), window=3):
            assert all(lower(table).peak_bytes <= 8 for table in family.tables)

    def test_a_sweep_puts_evaluations_where_values_change(self) -> None:
        # blocks change at steps 1 to 3 and say the same from then on: four evaluations belong at the beginning
        uneven = families(transformer(8), Budget(macs=0.5), 3, moving_until(3))[-1].tables
        tied = [table for table in uneven if "one path for all blocks" in table.provenance["table"]]
        assert len(tied) == 4  # the sweep's own forecasts, and Taylor's of order 0 to 2
        for table in tied:
            assert table.rows[:, :-1].all(axis=1).tolist() == [True] * 4 + [False] * 4

    @pytest.mark.parametrize("window", [1, 2, 3])
    def test_uneven_tables_fit_and_read_no_more_than_allowed(self, window: int) -> None:
        found = families(transformer(8), budget := Budget(macs=0.6, store_bytes=64), window, moving_until(5))
        uneven = [table for family in found for table in family.tables if "sweep" in table.provenance["table"]]
        assert uneven
        assert all(budget.allows(lower(table)) and table.windows.max() <= window for table in uneven)

    def test_not_one_step(self) -> None:
        with pytest.raises(InvalidBudget, match=r"at least 0\.05"):
            families(transformer(20), Budget(macs=0.04), window=3)
