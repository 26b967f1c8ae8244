"""The simulation reproduces what was measured, and what can be said without it."""

from itertools import pairwise

import pytest

from benchmarks import scaling_simulation
from benchmarks.scaling_simulation import Losses, Simulation, Stage, measured, small_case


@pytest.mark.parametrize("name", list(measured()))
def test_small_cases_are_reproduced(name: str) -> None:
    assert small_case(name) == pytest.approx(measured()[name]["seconds"], rel=0.15)


def test_the_slowest_part_sets_the_time() -> None:
    """Ten blocks of 2 s on one worker, behind a reader of 1 s, take 1 + 20 s; on two, behind two, 0.5 + 10 s."""
    reader = Stage("read", 1, 1.0)
    assert Simulation([reader, Stage("work", 1, 2.0)], 10).run().ends[-1] == pytest.approx(21)
    two = [Stage("read", 2, 0.5), Stage("work", 2, 2.0)]
    assert Simulation(two, 10).run().ends[-1] == pytest.approx(10.5)
    limited = Simulation([reader, Stage("work", 8, 1.0, moved=30.0)], 10, store=10.0).run()
    assert limited.ends[-1] == pytest.approx(1 + 30 + 1)
    assert limited.busy["store"] == pytest.approx(30 / 32)


def test_every_block_ends_once_whatever_is_lost() -> None:
    losses = Losses(0, restart=3.0, every=20.0, together=2)
    calm = Simulation([Stage("work", 4, 2.0)], 200).run()
    run = Simulation([Stage("work", 4, 2.0)], 200, losses=losses).run()
    assert len(run.ends) == len(calm.ends) == 200
    assert run.lost > 3
    assert run.again > 0
    # Each loss takes two of four workers for 3 s and what they were working on, 2 s at most.
    assert calm.ends[-1] < run.ends[-1] < calm.ends[-1] + run.lost * 5


def test_more_machines_are_faster_but_not_more_than_in_proportion() -> None:
    lines = [scaling_simulation.embedding("3B", gpus) for gpus in (1, 8, 64)]
    for few, many in pairwise(lines):
        assert few.rate < many.rate <= 8 * few.rate * 1.02
    spot, kept = (scaling_simulation.pretraining(64, spot=spot) for spot in (True, False))
    assert spot.lost > kept.lost
    assert spot.hours > kept.hours
