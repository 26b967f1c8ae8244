# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The null effects behind each perturbation: pooled over the controls of its group, measured for as long as it pays.

Most perturbations are seen to be nothing special after a few dozen controls. Where fewer than ten of them are as
extreme, twice as many are measured, and so on up to a limit (a sequential Monte Carlo test, Besag and Clifford 1991,
doi:10.1093/biomet/78.2.301). A small p value can only come out after all of them, so that stopping does not favour it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tahoex1_hf.perturbation.plan import Task
from tahoex1_hf.perturbation.statistics import ENOUGH, NullEffects, Tested

LEAST_POOL = 100  # fewest null effects that are pooled; with fewer, a perturbation has its own controls alone

Finished = Mapping[Task, Mapping[str, Any]]
Key = tuple[int, int]


def ranking_of(finished: Finished, tasks: Sequence[Task]) -> str:
    """Return the measure by which perturbations are compared."""
    toward = any("target_change" in finished[task] for task in tasks)
    return "target_change" if toward else "cosine_distance"


@dataclass
class Pool:
    """The null effects of a group, of perturbations of as many genes.

    Attributes:
        places: Control -> its place in `nulls`.
        nulls: Null effects.
    """

    places: dict[Task, int]
    nulls: NullEffects


class Pools:
    """The null effects of all groups.

    Args:
        finished: Measures of each perturbation.
        controls: Perturbations that were asked for, and the controls of each.
        coordinates: Function that returns the expression of a perturbation's genes, shape `(axes,)`.
        ranking: Measure that is compared.
    """

    def __init__(
        self,
        finished: Finished,
        controls: Mapping[Task, Sequence[Task]],
        coordinates: Callable[[Task], np.ndarray],
        ranking: str,
    ):
        self.finished, self.coordinates, self.ranking = finished, coordinates, ranking
        members: dict[Key, dict[Task, None]] = {}
        for task, others in controls.items():
            own = members.setdefault((task.group, len(task.genes)), {})
            own.update(dict.fromkeys(others))
            if others and not others[0].control:  # where all genes are tested, each is a control of the others
                own[task] = None
        self.pools: dict[Key, Pool] = {}
        for key, tasks in members.items():
            kept = [task for task in tasks if task in finished and np.isfinite(finished[task][ranking][0])]
            if len(kept) >= LEAST_POOL:
                effects = np.array([finished[task][ranking][0] for task in kept])
                places = {task: number for number, task in enumerate(kept)}
                expression = np.stack([coordinates(task) for task in kept])
                self.pools[key] = Pool(places, NullEffects(effects, expression, ranking == "target_change"))

    def test(self, task: Task, others: Sequence[Task]) -> Tested:
        """Compare a perturbation with the pool of its group, or with its own controls where the pool is small."""
        effect = float(self.finished[task][self.ranking][0])
        pool = self.pools.get((task.group, len(task.genes)))
        if pool is not None:
            return pool.nulls.test(effect, self.coordinates(task), pool.places.get(task))
        own = np.array([self.finished[other][self.ranking][0] for other in others], dtype=np.float64)
        own = own[np.isfinite(own)]
        if not len(own):
            return Tested(float("nan"), 0, 0, "")
        # Without coordinates all of them are one stratum.
        nothing = np.zeros((len(own), 1))
        return NullEffects(own, nothing, self.ranking == "target_change").test(effect, nothing[0])

    def promising(self, controls: Mapping[Task, Sequence[Task]], min_cells: int) -> list[Task]:
        """Return the perturbations with so few controls as extreme that more are worth measuring."""
        return [
            task
            for task, others in controls.items()
            if others
            and self.finished[task]["n_cells_changed"] >= min_cells
            and self.test(task, others).extreme < ENOUGH
        ]
