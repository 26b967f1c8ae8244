# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""A drug screen as conditions: the differences in mean expression between treated cells and their controls.

A condition is a drug in a context (and a batch, where there are batches). Its profile is the mean over its cells of
log(1 + counts per 10,000) of each gene. Its change is the profile minus the same mean over the control cells of its
context and batch. Cells are summed in chunks: memory holds conditions x genes, never cells x genes.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from tahoex1_hf.cells.opening import read_obs_column
from tahoex1_hf.common.texts import MISSING, as_text
from tahoex1_hf.encoding_tahoe_x1 import log_normalize
from tahoex1_hf.finetuning.cells.labelled import FinetuningData
from tahoex1_hf.finetuning.config import DrugResponseConfig

logger = logging.getLogger(__name__)

_CHUNK_CELLS = 4096  # cells read at once


@dataclass(frozen=True, eq=False)
class Screen:
    """The conditions of a screen; a row is a number among these.

    Attributes:
        drugs: Names of the drugs, shape `(conditions,)`.
        contexts: Names of the contexts, shape `(conditions,)`.
        batches: Names of the batches, all empty where there are none, shape `(conditions,)`.
        num_cells: Number of treated cells, shape `(conditions,)`, int64.
        changes: Changes of the genes, shape `(conditions, genes)`, float32.
        controls: Number of the group of control cells, shape `(conditions,)`, int64.
        control_cells: For each group, the numbers of its cells in the file.
        control_profiles: Profiles of the groups, shape `(groups, genes)`, float32.
        genes: Token ids, rising, shape `(genes,)`, int64.
        left_out: Reason -> number of conditions or cells that are left out.
    """

    drugs: np.ndarray
    contexts: np.ndarray
    batches: np.ndarray
    num_cells: np.ndarray
    changes: np.ndarray
    controls: np.ndarray
    control_cells: list[np.ndarray]
    control_profiles: np.ndarray
    genes: np.ndarray
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.drugs)

    def units(self, kind: str) -> np.ndarray:
        """Return the drugs (or for `kind="context"` the contexts) of the conditions, shape `(conditions,)`."""
        return self.drugs if kind == "drug" else self.contexts


def read_screen(config: DrugResponseConfig, cells: FinetuningData) -> Screen:
    """Group the cells of a run into conditions.

    Args:
        config: Configuration of the run.
        cells: All cells of the file.

    Raises:
        ValueError: For columns that are not there, and where there are no controls or too few conditions.
    """
    drugs, contexts, batches, missing = _columns(config)
    treated = ~missing & (drugs != config.control.strip())
    untreated = ~missing & (drugs == config.control.strip())
    if not untreated.any():
        listed = ", ".join(sorted(set(drugs[~missing]))[:5])
        raise ValueError(f"control={config.control} stands for no cell in drugs={config.drugs}; there are {listed}.")
    left_out = {"cells without a drug, context or batch": int(missing.sum())}
    keys = np.array(list(zip(contexts, batches, drugs, strict=True)), dtype=object)
    groups, group_of = _units(keys[:, :2], untreated)
    conditions, condition_of = _units(keys, treated)
    enough = np.bincount(group_of[untreated], minlength=len(groups)) >= config.min_condition_cells
    place = {key: number for number, key in enumerate(groups) if enough[number]}
    counts = np.bincount(condition_of[treated], minlength=len(conditions))
    controls = np.array([place.get(key[:2], -1) for key in conditions], dtype=np.int64)
    left_out["conditions without enough control cells"] = int((controls < 0).sum())
    few = (counts < config.min_condition_cells) & (controls >= 0)
    left_out["conditions with too few cells"] = int(few.sum())
    kept = np.flatnonzero((controls >= 0) & ~few)
    if len(kept) < 3:
        raise ValueError(
            f"{len(kept)} conditions have {config.min_condition_cells} cells and as many controls: three are the "
            f"least ({left_out}). Check drugs, control, context and batch, or lower min_condition_cells."
        )
    for reason, number in left_out.items():
        if number:
            logger.warning("%d %s are left out.", number, reason)
    units = np.full(len(drugs), -1)
    number_of = np.full(len(conditions), -1)
    number_of[kept] = np.arange(len(kept))
    units[treated] = number_of[condition_of[treated]]
    units[untreated] = np.where(enough[group_of[untreated]], len(kept) + group_of[untreated], -1)
    genes = most_variable(cells, units >= 0, config.response_genes)
    means = mean_profiles(cells, units, len(kept) + len(groups), genes)
    profiles = means[len(kept) :]
    names = np.array(conditions, dtype=object)[kept]
    return Screen(
        drugs=names[:, 2],
        contexts=names[:, 0],
        batches=names[:, 1],
        num_cells=counts[kept],
        changes=means[: len(kept)] - profiles[controls[kept]],
        controls=controls[kept],
        control_cells=[np.flatnonzero(untreated & (group_of == number)) for number in range(len(groups))],
        control_profiles=profiles,
        genes=genes,
        left_out=left_out,
    )


def _columns(config: DrugResponseConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return drug, context and batch of every cell, and whether one of them is missing."""
    drugs, contexts = _column(config, config.drugs, "drugs"), _column(config, config.context, "context")
    missing = np.isin(drugs, MISSING) | np.isin(contexts, MISSING)
    if config.batch is None:
        return drugs, contexts, np.full(len(drugs), "", dtype=object), missing
    batches = _column(config, config.batch, "batch")
    return drugs, contexts, batches, missing | np.isin(batches, MISSING)


def _column(config: DrugResponseConfig, name: str | None, role: str) -> np.ndarray:
    column = read_obs_column(config.data, str(name), role)
    return as_text(column).str.strip().to_numpy(dtype=object)


def _units(keys: np.ndarray, chosen: np.ndarray) -> tuple[list[tuple[Any, ...]], np.ndarray]:
    """Return the distinct keys of the chosen cells, sorted, and the number of each cell's key (-1 for the others)."""
    texts = [tuple(key) if use else None for key, use in zip(keys, chosen, strict=True)]
    distinct = sorted({key for key in texts if key is not None})
    numbers = {key: number for number, key in enumerate(distinct)}
    return distinct, np.array([-1 if key is None else numbers[key] for key in texts], dtype=np.int64)


def most_variable(cells: FinetuningData, used: np.ndarray, number: int) -> np.ndarray:
    """Return the genes whose log-normalised expression varies most over the used cells: token ids, rising.

    The model and the baselines are scored on these genes. Their choice reveals nothing about a drug's effect on them.
    """
    size = len(cells.tokenizer)
    sums, squares = np.zeros(size), np.zeros(size)
    rows = np.flatnonzero(used)
    for start in range(0, len(rows), _CHUNK_CELLS):
        chunk = cells.rows_at(cells.numbers[rows[start : start + _CHUNK_CELLS]])
        values = log_normalize(chunk.counts, chunk.offsets).astype(np.float64)
        sums += np.bincount(chunk.tokens, values, minlength=size)
        squares += np.bincount(chunk.tokens, values**2, minlength=size)
    variances = squares / len(rows) - (sums / len(rows)) ** 2
    order = np.argsort(-variances, kind="stable")[:number]
    return np.sort(order[variances[order] > 1e-12])


def mean_profiles(cells: FinetuningData, units: np.ndarray, num_units: int, genes: np.ndarray) -> np.ndarray:
    """Compute mean log-normalised expression over the cells of each unit.

    Args:
        cells: Cells of the file.
        units: Number of each cell's unit, -1 for none, shape `(cells,)`.
        num_units: Number of units.
        genes: Token ids, shape `(genes,)`.

    Returns:
        `(units, genes)` float32; NaN for a unit without cells.
    """
    slots = np.full(len(cells.tokenizer), -1)
    slots[genes] = np.arange(len(genes))
    sums = np.zeros((num_units, len(genes)))
    rows = np.flatnonzero(units >= 0)
    for start in range(0, len(rows), _CHUNK_CELLS):
        part = rows[start : start + _CHUNK_CELLS]
        chunk = cells.rows_at(cells.numbers[part])
        values = log_normalize(chunk.counts, chunk.offsets)
        slot = slots[chunk.tokens]
        known = slot >= 0
        np.add.at(sums, (units[part][chunk.cells()[known]], slot[known]), values[known])
    counts = np.bincount(units[rows], minlength=num_units)
    with np.errstate(invalid="ignore"):
        return (sums / counts[:, None]).astype(np.float32)
