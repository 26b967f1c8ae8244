# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Interactions of two genes: what perturbing both does beyond the sum of what each does alone.

How far an interaction varies with the cells is seen in groups of them: the shifts of a pair and of its genes are
summed in the same groups, which are so few that they take little memory however many cells there are.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.perturbation.plan import Task
from tahoex1_hf.perturbation.tables import interval

if TYPE_CHECKING:
    from pandas import DataFrame

    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

GROUPS = 32  # groups of cells, told apart by the cells' content
SHIFT = "shift"  # mean shift of the group's cells, of which those that do not change shift by nothing
SHIFTS, CELLS = "shifts", "shift_cells"  # sums of the shifts of each group of cells, and the number of its cells
_COLUMNS = ["group", "gene", "gene_id", "interaction", "lower", "upper", "interaction_size"]
_COLUMNS += ["n_null", "null_mean", "p_value", "q_value"]


def packed(sums: np.ndarray) -> str:
    """Return sums of shifts, `(groups, width)`, as text that a journal holds."""
    return base64.b64encode(np.ascontiguousarray(sums, dtype="<f4").tobytes()).decode()


def _unpacked(record: Mapping[str, Any]) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(record[SHIFTS]), dtype="<f4").astype(np.float64)
    return flat.reshape(len(record[CELLS]), -1)


def interaction(both: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Compare the mean shift of a pair with the sum of its genes' shifts.

    Args:
        both: Mean shift of the cells when both genes are perturbed, shape `(width,)`.
        first: Mean shift when the first is.
        second: Mean shift when the second is.

    Returns:
        How far the pair shifts cells beyond the sum, along the sum and as a share of it: 0 where effects add up, above
        where they reinforce each other, below where they overlap (-1 where nothing is left). And the length of the
        difference from the sum, as a share of the sum. NaN where the sum is nothing.
    """
    total = first + second
    length = float(np.linalg.norm(total))
    if length == 0:
        return float("nan"), float("nan")
    beyond = both - total
    return float(beyond @ total) / length**2, float(np.linalg.norm(beyond)) / length


def interaction_error(both: np.ndarray, first: np.ndarray, second: np.ndarray, cells: np.ndarray) -> tuple[float, int]:
    """Return the standard error of an interaction over cells.

    A cell's shifts by the pair and by each gene go together: what the cell adds to the interaction is linear in them,
    near the means over all cells, and it is the variance of that which counts (the delta method).

    Args:
        both: Sums of the shifts of groups of cells when both genes are perturbed, shape `(groups, width)`.
        first: The same when the first is.
        second: The same when the second is.
        cells: Number of cells of each group, shape `(groups,)`.

    Returns:
        The error, NaN for fewer than two groups with cells or where the sum is nothing; and the number of these.
    """
    groups, number, total = int((cells > 0).sum()), cells.sum(), first + second
    pair, alone = both.sum(axis=0) / max(number, 1), total.sum(axis=0) / max(number, 1)
    square = float(alone @ alone)
    if groups < 2 or square == 0:
        return float("nan"), groups
    of_pair, of_sum = both - cells[:, None] * pair, total - cells[:, None] * alone
    parts = (of_pair @ alone + of_sum @ pair) / square - 2 * (pair @ alone) / square**2 * (of_sum @ alone)
    return float(np.sqrt(groups / (groups - 1) * (parts**2).sum()) / number), groups


def interaction_table(
    finished: Mapping[Task, Mapping[str, Any]],
    controls: Mapping[Task, Sequence[Task]],
    group_names: Sequence[str],
    labels: Mapping[int, str],
    tokenizer: "TahoeX1Tokenizer",
    min_cells: int,
) -> "DataFrame":
    """Make the table of interactions, those that differ most from the sum first in each group.

    Args:
        finished: Measures of each perturbation, with its mean shift.
        controls: Perturbations that were asked for, and the controls of each.
        group_names: Names of the groups.
        labels: Token -> name of the gene.
        tokenizer: Tokenizer, for the Ensembl ids.
        min_cells: Fewest changed cells of a perturbation that is compared with controls.
    """
    import pandas as pd
    from scipy.stats import false_discovery_control

    rows = []
    for task, others in controls.items():
        if len(task.genes) != 2:
            continue
        found = _measured(finished, task)
        assert found is not None  # the single genes were asked for, too
        parts = [task, *(Task(task.group, (gene,)) for gene in task.genes)]
        both, first, second = (_unpacked(finished[part]) for part in parts)
        error = interaction_error(both, first, second, np.array(finished[task][CELLS]))
        enough = all(finished[part]["n_cells_changed"] >= min_cells for part in parts)
        null = [_measured(finished, other) for other in (others if enough else [])]
        sizes = np.array([each[1] for each in null if each is not None and np.isfinite(each[1])])
        known = len(sizes) > 0 and np.isfinite(found[1])
        rows.append(
            {
                "_group": task.group,
                "group": group_names[task.group],
                "gene": "+".join(labels[token] for token in task.genes),
                "gene_id": "+".join(tokenizer.convert_ids_to_tokens(list(task.genes))),
                "interaction": found[0],
                **interval(found[0], *error),
                "interaction_size": found[1],
                "n_null": len(sizes),
                "null_mean": float(sizes.mean()) if known else np.nan,
                "p_value": (1 + (sizes >= found[1]).sum()) / (1 + len(sizes)) if known else np.nan,
            }
        )
    table = pd.DataFrame(rows).sort_values(["_group", "interaction_size"], ascending=[True, False], ignore_index=True)
    table["q_value"], tested = np.nan, table["p_value"].notna()
    if tested.any():
        table.loc[tested, "q_value"] = false_discovery_control(table.loc[tested, "p_value"].to_numpy())
    return table[_COLUMNS]


def _measured(finished: Mapping[Task, Mapping[str, Any]], pair: Task) -> tuple[float, float] | None:
    """Return the interaction of a pair; None where one of its genes was not perturbed alone."""
    alone = [Task(pair.group, (gene,), pair.control) for gene in pair.genes]
    if any(task not in finished for task in alone):
        return None
    both, first, second = (np.array(finished[task][SHIFT]) for task in (pair, *alone))
    return interaction(both, first, second)
