# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""In-silico perturbation: delete, overexpress or set genes in cells, and measure how the model's outputs change."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from tahoex1_hf.cells.encoding import EncodeOptions
from tahoex1_hf.cells.gene_symbols import Table
from tahoex1_hf.cells.genes import GeneOptions, known_symbols
from tahoex1_hf.cells.opening import open_cells
from tahoex1_hf.common.digests import json_digest, some_weights_digest, tokenizer_digest, weights_digest
from tahoex1_hf.common.prefetch import prefetch
from tahoex1_hf.common.progress import progress_bar
from tahoex1_hf.encoding_tahoe_x1 import mix64
from tahoex1_hf.hub.models import expression_decoder, model_and_tokenizer, without_peft
from tahoex1_hf.inference.chunks import with_settings
from tahoex1_hf.inference.encoder import CellEncoder, Dtype
from tahoex1_hf.inference.expression import ExpressionPredictor
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1PreTrainedModel
from tahoex1_hf.perturbation.cells import Change, PerturbationEncoder, PerturbationMode
from tahoex1_hf.perturbation.interactions import CELLS, GROUPS, SHIFT, SHIFTS, interaction_table, packed
from tahoex1_hf.perturbation.journal import Journal, recorded
from tahoex1_hf.perturbation.measures import BlockMeasures, Forward, Unperturbed, unit, unperturbed
from tahoex1_hf.perturbation.nulls import Pools, ranking_of
from tahoex1_hf.perturbation.plan import (
    Controls,
    GeneNames,
    Groups,
    Levels,
    Task,
    blocks,
    choose_cells,
    chunks,
    make_groups,
)
from tahoex1_hf.perturbation.tables import affected_table, ranked_table
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

logger = logging.getLogger(__name__)

Combined = Literal["alone", "together", "pairs"]
_MOST_TIMES = 20  # times as many controls as at first are measured for a perturbation that few of them match


@dataclass
class PerturbationResult:
    """Tables that `perturb_genes` returns.

    Attributes:
        table: One row per perturbation and group of cells, ranked within the group. Columns:

            - `group`, `rank`, `gene`, `gene_id`; several genes perturbed together are joined by `+`.
            - `n_cells`; `n_cells_expressing`, the number of cells that express at least one of the genes;
              `n_cells_changed`.
            - `cosine_distance`, 1 - cosine of the cell embeddings before and after; `euclidean_shift`, the distance of
              the embeddings as the model gives them, not normalised; with a target, `target_change`, the change of the
              cosine to the target's mean embedding (positive is toward the target). All are means over the changed
              cells; columns with `_se` have their standard errors.
            - with `expression`, `predicted_abs_change` and `predicted_change`, the change of the predicted expression
              of the other genes, in bins: the mean over a cell's genes, then over cells.
            - `lower` and `upper`: 95 % interval over cells of the measure by which the rows are ranked.
            - `n_null`, `null_mean`, `null_sd`, `z_score`, `p_value` and `q_value`: comparison with the controls, by
              `target_change` where there is a target and by `cosine_distance` otherwise, which is also the order of
              the rows. `n_null` to `z_score` are about the `null_genes` nearest controls.
            - `p_value`: (1 + number of controls that are as extreme) / (1 + number of controls), one-sided for the
              distance, two-sided about the controls' median for the target. From 100 controls in the group on, all of
              them count, pooled over strata of similar expression (see `NullEffects`); a control as extreme as few
              others may have its p value from a fitted tail. `n_pooled` is the number of controls behind it, and
              `p_method` is `count` or `tail`. `q_value` is Benjamini and Hochberg's, over the table.
        affected: With `expression`, one row per perturbation and gene whose predicted expression changes most, with
            the columns `group`, `gene`, `gene_id`, `affected_gene`, `affected_gene_id`, `mean_change` and
            `standard_error` (over cells, in bins) and `n_cells` (number of cells in which the gene was predicted).
        interactions: With `pairs`, one row per pair and group, those that differ most from the sum first: `group`,
            `gene`, `gene_id`; `interaction`, how far the mean shift of the group's cells goes beyond the sum of the
            shifts by each gene alone, along that sum and as a share of it (0 where effects add up, -1 where nothing is
            left); `lower` and `upper`, its 95 % interval over cells, in each of which the pair is compared with its
            genes (by Student's t over 32 random groups of cells); `interaction_size`, the length of the difference
            from the sum, as a share of it; and `n_null`, `null_mean`, `p_value`, `q_value` by the sizes of control
            pairs.
    """

    table: "DataFrame"
    affected: "DataFrame | None"
    interactions: "DataFrame | None" = None


def perturb_genes(
    adata: "AnnData | str | Path",
    model: TahoeX1PreTrainedModel | str | Path,
    tokenizer: TahoeX1Tokenizer | None = None,
    genes: Sequence[str] | Literal["all"] = "all",
    *,
    size: str | None = None,
    revision: str | None = None,
    mode: PerturbationMode = "delete",
    value: float | None = None,
    together: bool = False,
    pairs: bool = False,
    cells: Any = None,
    groupby: str | None = None,
    target: Any = None,
    expression: bool = False,
    num_affected: int = 20,
    null_genes: int = 50,
    most_null_genes: int | None = None,
    min_cells: int = 10,
    layer: str | None = None,
    gene_id_column: str | None = None,
    gene_symbols: Table | str | Path | None = None,
    species: str = "human",
    orthologs: Mapping[str, Sequence[str]] | str | Path | None = None,
    drugs: str | Sequence[str | None] | None = None,
    unknown_drugs: str | None = "error",
    max_length: int | None = None,
    overflow: str | None = None,
    seed: int = 0,
    batch_tokens: int | None = None,
    device: str | torch.device | None = None,
    dtype: Dtype = "float32",
    partial: str | Path | None = None,
    restart: bool = False,
    progress: bool = True,
) -> PerturbationResult:
    """Change the counts of genes in cells, and measure how far the cells' embeddings move.

    A changed cell is encoded as if it had been measured that way: bins are computed anew from all its counts. In cells
    longer than the context, the other genes of the sample are the same with and without the perturbation, and the
    perturbed gene is always in the sample. Means are over the cells whose counts change: deleting a gene from a cell
    that does not express it is not a perturbation.

    The null distribution of a perturbation consists of the shifts that `null_genes` other genes cause, perturbed in
    the same way in the cells of the same group: the genes nearest in expression (share of cells that express them, and
    mean count there; see `Controls`). Where genes are named, the controls are perturbed in addition, which is most of
    the work. Perturbations that change fewer than `min_cells` cells are not compared with controls, and ranked last.

    Expression is predicted by the expression decoder for genes that are hidden from the model, as in its training: the
    half of the cell without the perturbed gene. The decoder was never trained on genes that the model sees.

    Args:
        adata: Cells with raw counts, in memory or backed, or the path of an `.h5ad` file; it is not changed.
        model: As in `embed_anndata`.
        tokenizer: As in `embed_anndata`.
        genes: Ensembl ids or symbols (from `gene_symbols`, `var_names` or a column of `var`), one perturbation each;
            or `"all"`, the genes that at least `min_cells` cells express.
        size: As in `embed_anndata`.
        revision: As in `embed_anndata`.
        mode: `"delete"` sets the count to 0. `"overexpress"` sets it to the cell's largest count, so that the gene is
            in the top bin, whether the cell expressed it or not. `"percentile"` raises it to the percentile `value` of
            the counts of the genes that the cell expresses. `"set"` sets it to `value`.
        value: Raw count for `"set"`, percentile for `"percentile"`.
        together: Whether to perturb all genes at once, as one perturbation.
        pairs: Whether to perturb each two of the named genes as well, and compare them with the sum of the two.
        cells: Cells to perturb: a comparison over columns of `obs` (`'cell_type == "B" and n_genes > 500'`; names with
            blanks stand between backticks), or a mask; by default all.
        groupby: Column of `obs`; the genes are ranked in each of its groups.
        target: Cells, chosen like `cells`, toward whose mean embedding the shift is measured.
        expression: Whether to measure predicted expression too. It needs the pretraining head, and takes about four
            times as long.
        num_affected: With `expression`, number of most affected genes to list per perturbation.
        null_genes: Number of controls per perturbation; 0 for none.
        most_null_genes: Most controls of a named perturbation that fewer than ten controls match: their number is
            doubled until ten do, or these are measured. By default 20 times `null_genes`.
        min_cells: Fewest cells that must express a gene for it to be a control, or one of `"all"`: cells of the group
            where genes are deleted, of all groups otherwise. Also the fewest changed cells of a perturbation that is
            compared with controls.
        layer: As in `embed_anndata`.
        gene_id_column: As in `embed_anndata`.
        gene_symbols: As in `embed_anndata`.
        species: As in `embed_anndata`.
        orthologs: As in `embed_anndata`.
        drugs: As in `embed_anndata`.
        unknown_drugs: As in `embed_anndata`, but `"error"` by default.
        max_length: As in `embed_anndata`.
        overflow: As in `embed_anndata`; the perturbed genes are always taken.
        seed: As in `embed_anndata`; also the seed of the halves of cells in predictions, and of the choice among
            controls that are equally near.
        batch_tokens: As in `embed_anndata`.
        device: As in `embed_anndata`.
        dtype: As in `embed_anndata`; by default float32, as bfloat16 moves embeddings as far as many perturbations.
        partial: File that keeps finished perturbations, from which the same call resumes; remove it afterwards.
        restart: Whether to discard the results of an unfinished run with other arguments in `partial`.
        progress: Whether to show a progress bar.

    Returns:
        The ranked perturbations, and with `expression` the most affected genes.

    Raises:
        ValueError: For genes that are unknown or that no chosen cell expresses (when deleting), for a choice without
            cells, for a model without pretraining head where `expression` is asked for, and for counts and arguments
            that cannot be used.
    """
    change = Change(mode, value)
    most_null_genes = _MOST_TIMES * null_genes if most_null_genes is None else most_null_genes
    if min(null_genes, most_null_genes) < 0 or min_cells < 1 or num_affected < 1:
        raise ValueError(
            f"null_genes={null_genes}, most_null_genes={most_null_genes}, min_cells={min_cells}, "
            f"num_affected={num_affected}: pass at least 0, 0, 1 and 1."
        )
    if pairs and (together or isinstance(genes, str) or len(genes) < 2):
        raise ValueError("pairs: name two genes or more, and do not perturb all of them together.")
    with ExitStack() as stack:
        loaded, tokenizer = model_and_tokenizer(model, tokenizer, size=size, revision=revision, expression=expression)
        options = EncodeOptions(with_settings(tokenizer, max_length, overflow), drugs, seed, unknown_drugs)
        place = GeneOptions(gene_id_column, gene_symbols, layer, species=species, orthologs=orthologs)
        opened = open_cells(adata, options.tokenizer, place)
        forward = _forward(without_peft(loaded), options.tokenizer, expression, batch_tokens, device, dtype)
        if not restart:
            forward.encoder.go_on_as(recorded(partial))
        groups = make_groups(opened, choose_cells(opened, cells, "cells"), groupby)
        toward = None if target is None else np.flatnonzero(choose_cells(opened, target, "target"))
        used = np.unique(np.concatenate([*groups.numbers, *([] if toward is None else [toward])]))
        source = PerturbationEncoder(opened, options, used)
        levels = Levels.measure(source, groups)
        names = GeneNames(source, known_symbols(options.tokenizer, place))
        combined: Combined = "together" if together else "pairs" if pairs else "alone"
        controls, finder = _plan(genes, names, groups, levels, change, combined, null_genes, min_cells)
        rounds = Rounds(finder, null_genes, 0 if genes == "all" else most_null_genes, min_cells)
        run = _Run(source, groups, levels, forward, change, controls, rounds, num_affected, pairs)
        settings = {"mode": mode, "value": value, "expression": expression, "num_affected": num_affected}
        settings |= {"most_null_genes": most_null_genes, "pairs": pairs}
        settings |= {"shift_groups": GROUPS} if pairs else {}
        journal = stack.enter_context(Journal(partial, {**settings, **run.identity(loaded, toward)}, restart))
        run.carry_out(journal, toward, progress)
        opened.check_unchanged()
    return run.result(journal.finished, names.labels(genes))


def _forward(
    model: TahoeX1PreTrainedModel,
    tokenizer: TahoeX1Tokenizer,
    expression: bool,
    batch_tokens: int | None,
    device: str | torch.device | None,
    dtype: Dtype,
) -> Forward:
    if model.config.cell_pooling == "mean_with_padding":
        raise ValueError(
            'cell_pooling="mean_with_padding" makes an embedding depend on the cells it shares a batch with, more '
            'than on a gene: set model.config.cell_pooling = "mean".'
        )
    decoder = expression_decoder(model) if expression else None
    encoder = CellEncoder(model, tokenizer, batch_tokens=batch_tokens, device=device, dtype=dtype)
    return Forward(encoder, None if decoder is None else ExpressionPredictor(encoder, decoder))


def _plan(
    genes: Sequence[str] | str,
    names: GeneNames,
    groups: Groups,
    levels: Levels,
    change: Change,
    combined: Combined,
    null_genes: int,
    min_cells: int,
) -> tuple[dict[Task, list[Task]], Controls]:
    """Return the perturbations asked for with the controls of each, and what finds controls."""
    source, all_genes = names.source, isinstance(genes, str)
    members: list[list[tuple[int, ...]]]
    if all_genes:
        if genes != "all" or combined != "alone":
            raise ValueError(f'genes={genes!r}, perturbed {combined}: pass a list of genes, or "all" one at a time.')
        tested = np.zeros(0, dtype=np.int64)
    else:
        tested = source.column_of[names.tokens(genes)]
    deleting = change.mode == "delete"
    seed = np.array([source.options.seed], dtype=np.uint64)
    ties = mix64(mix64(seed) + source.tokens.astype(np.uint64))  # random, but the same for any order of genes
    finder = Controls(levels, tested, null_genes, min_cells, everywhere=not deleting, ties=ties)
    if all_genes:
        members = [[(column,) for column in np.flatnonzero(row).tolist()] for row in finder.expressed]
        if not any(members):
            raise ValueError(
                f"No gene is expressed by min_cells={min_cells} cells: choose more cells, or a lower min_cells."
            )
    else:
        silent = [
            str(name) for name, column in zip(genes, tested, strict=True) if not levels.expressing[:, column].any()
        ]
        if silent and deleting:
            raise ValueError(f"None of the chosen cells expresses {silent}: there is nothing to delete.")
        each: list[tuple[int, ...]] = [(column,) for column in tested.tolist()]
        if combined != "alone":
            together = combinations(tested.tolist(), len(each) if combined == "together" else 2)
            each = [*(each if combined == "pairs" else []), *together]
        members = [each] * len(groups.names)
    controls: dict[Task, list[Task]] = {}
    for group, perturbations in enumerate(members):
        for columns in perturbations:
            task = Task(group, tuple(source.tokens[list(columns)].tolist()))
            few = deleting and len(columns) == 1 and levels.expressing[group, columns[0]] < min_cells
            controls[task] = [
                Task(group, tuple(source.tokens[list(control)].tolist()), control=not all_genes)
                for control in ([] if few else finder.of(group, columns))
            ]
    return controls, finder


@dataclass(frozen=True)
class Rounds:
    """How many controls are measured.

    Attributes:
        finder: Finder of controls.
        first: number of controls of each perturbation.
        most: most controls of a perturbation that few controls match.
        min_cells: fewest changed cells of a perturbation that is compared with controls.
    """

    finder: Controls
    first: int
    most: int
    min_cells: int


class _Run:
    """All perturbations of one call."""

    def __init__(
        self,
        source: PerturbationEncoder,
        groups: Groups,
        levels: Levels,
        forward: Forward,
        change: Change,
        controls: dict[Task, list[Task]],
        rounds: Rounds,
        num_affected: int,
        pairs: bool,
    ):
        self.source, self.groups, self.levels, self.forward, self.change = source, groups, levels, forward, change
        self.controls, self.rounds, self.num_affected, self.pairs = controls, rounds, num_affected, pairs
        self.tasks = self._all_tasks()

    def _all_tasks(self) -> list[Task]:
        return list(dict.fromkeys([*self.controls, *(task for others in self.controls.values() for task in others)]))

    def identity(self, model: torch.nn.Module, toward: np.ndarray | None) -> dict[str, Any]:
        """Return everything that decides the result, apart from the kind of device."""
        options = self.source.options
        numbers = [each.tolist() for each in self.groups.numbers]
        return {
            "model": some_weights_digest(model),
            "weights": weights_digest(model),
            "tokenizer": tokenizer_digest(options.tokenizer),
            "cells": json_digest([self.groups.names, numbers]),
            "counts": json_digest([self.levels.expressing.tolist(), self.levels.sums.tolist()]),
            "target": None if toward is None else json_digest(toward.tolist()),
            "genes": json_digest([[task.group, task.genes, task.control] for task in self.tasks]),
            "drugs": options.drugs if options.drugs is None or isinstance(options.drugs, str) else list(options.drugs),
            "unknown_drugs": options.unknown_drugs,
            "seed": options.seed,
            "sampled_by": "content",
            "dtype": self.forward.encoder.dtype_name,
            "compiled_attention": self.forward.encoder.attention == "compiled",
        }

    def carry_out(self, journal: Journal, toward: np.ndarray | None, progress: bool) -> None:
        """Measure the perturbations that the journal lacks, and add them to it."""
        total, done = sum(map(self._most_changed, self.tasks)), sum(map(self._most_changed, journal.finished))
        with progress_bar(progress, total=total, initial=done, unit="cell", desc="Perturbing") as bar:
            number, target, tasks = self.rounds.first, None, self.tasks
            while True:
                if target is None and toward is not None and any(task not in journal.finished for task in tasks):
                    target = self._mean_embedding(toward)
                self._carry_out_round(tasks, journal, target, bar)
                if not 0 < number < self.rounds.most:
                    break
                number = min(2 * number, self.rounds.most)
                tasks = self._add_controls(journal, number)
                bar.total = (bar.total or 0) + sum(map(self._most_changed, tasks))
                bar.update(sum(self._most_changed(task) for task in tasks if task in journal.finished))

    def _carry_out_round(self, tasks: Sequence[Task], journal: Journal, target: np.ndarray | None, bar: tqdm) -> None:
        for group in range(len(self.groups.names)):
            blocks_of_group = list(self._blocks(group, tasks))
            todo = [block for block in blocks_of_group if any(task not in journal.finished for task in block)]
            cells = self._unperturbed(group) if todo else []
            for block in todo:
                journal.add(self._measure(block, cells, target, bar))

    def _add_controls(self, journal: Journal, number: int) -> list[Task]:
        """Add controls to the perturbations that few controls match; return those that are new."""
        for task in self._pools(journal.finished).promising(self.controls, self.rounds.min_cells):
            columns = self.source.column_of[list(task.genes)].tolist()
            self.controls[task] = [
                Task(task.group, tuple(self.source.tokens[list(control)].tolist()), control=True)
                for control in self.rounds.finder.of(task.group, columns, number)
            ]
        before = set(self.tasks)
        new = [task for task in self._all_tasks() if task not in before]
        self.tasks = [*self.tasks, *new]
        return new

    def _pools(self, finished: Mapping[Task, Mapping[str, Any]]) -> Pools:
        places = [self.levels.coordinates(group) for group in range(len(self.groups.names))]

        def coordinates(task: Task) -> np.ndarray:
            return np.asarray(places[task.group][self.source.column_of[list(task.genes)]].mean(axis=0))

        return Pools(finished, self.controls, coordinates, ranking_of(finished, list(self.controls)))

    def _blocks(self, group: int, tasks: Sequence[Task]) -> Iterator[Sequence[Task]]:
        """Yield blocks of perturbations of equally many genes, of those asked for and of controls."""
        of_group = [task for task in tasks if task.group == group]
        for control, size in sorted({(task.control, len(task.genes)) for task in of_group}):
            own = [task for task in of_group if (task.control, len(task.genes)) == (control, size)]
            yield from blocks(own, [self._most_changed(task) for task in own], self._predicts(control))

    def _most_changed(self, task: Task) -> int:
        """Return the most cells that a perturbation can change."""
        if self.change.mode != "delete":
            return len(self.groups.numbers[task.group])
        expressing = self.levels.expressing[task.group, self.source.column_of[list(task.genes)]]
        return min(int(expressing.sum()), len(self.groups.numbers[task.group]))

    def _predicts(self, control: bool) -> bool:
        return self.forward.predictor is not None and not control

    def _mean_embedding(self, numbers: np.ndarray) -> np.ndarray:
        """Return the `(width,)` mean of the cells' embeddings of length 1, scaled to length 1."""
        total = np.zeros(self.forward.encoder.width)
        for cells in prefetch(self.source.read(part) for part in chunks(numbers)):
            self.source.check(cells)
            total += unit(self.forward.pooled(cells.encoded(), cells, cells.numbers)).sum(0)
        return unit(total)

    def _unperturbed(self, group: int) -> list[Unperturbed]:
        reading = (self.source.read(numbers) for numbers in self.groups.chunks(group))
        return [unperturbed(cells, self.forward) for cells in prefetch(reading)]

    def _measure(
        self, block: Sequence[Task], cells: Sequence[Unperturbed], toward: np.ndarray | None, bar: tqdm
    ) -> dict[Task, dict[str, Any]]:
        members = np.array([task.genes for task in block])
        slots = self.source.column_of if self._predicts(block[0].control) else None
        groups = 0 if not self.pairs else 1 if block[0].control else GROUPS  # no interval is made of controls
        measures = BlockMeasures(members, self.change, self.forward, toward, slots, groups)
        expected = sum(map(self._most_changed, block))
        for num_cells in measures.add(self.source.read, cells):
            expected -= num_cells
            bar.update(num_cells)
        bar.update(expected)  # cells that turned out not to change
        records = {}
        for number, task in enumerate(block):
            record: dict[str, Any] = {
                "n_cells": measures.num_cells,
                "n_cells_expressing": int(measures.num_expressing[number]),
                "n_cells_changed": int(measures.cosine.count[number]),
                "cosine_distance": measures.cosine.of(number),
                "euclidean_shift": measures.euclidean.of(number),
            }
            if toward is not None:
                record["target_change"] = measures.toward.of(number)
            if measures.shifts is not None:
                record[SHIFT] = (measures.shifts[number].sum(axis=0) / measures.num_cells).tolist()
            if measures.shifts is not None and groups > 1:
                record |= {SHIFTS: packed(measures.shifts[number]), CELLS: measures.group_cells.tolist()}
            if slots is not None:
                record["predicted_abs_change"] = measures.absolute.of(number)
                record["predicted_change"] = measures.signed.of(number)
                record["affected"] = [
                    (int(self.source.tokens[slot]), mean, error, count)
                    for slot, mean, error, count in measures.affected(number, self.num_affected)
                ]
            records[task] = record
        return records

    def result(self, finished: Mapping[Task, Mapping[str, Any]], labels: Mapping[int, str]) -> PerturbationResult:
        """Make the tables of finished perturbations.

        Args:
            finished: Measures of each perturbation.
            labels: Names of the genes by token.
        """
        groups, tokenizer = self.groups.names, self.source.tokenizer
        first, min_cells = self.rounds.first, self.rounds.min_cells
        table = ranked_table(
            finished, self.controls, groups, labels, tokenizer, first, min_cells, self._pools(finished)
        )
        affected = None
        if self.forward.predictor is not None:
            affected = affected_table(finished, list(self.controls), groups, labels, tokenizer)
        interactions = None
        if self.pairs:
            interactions = interaction_table(finished, self.controls, groups, labels, tokenizer, min_cells)
        return PerturbationResult(table, affected, interactions)


__all__ = ["PerturbationResult", "perturb_genes"]
