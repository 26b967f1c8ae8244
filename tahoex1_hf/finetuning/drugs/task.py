# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Response to drugs: how the mean expression of a population changes, from its control cells and the drug.

What is predicted. For a control cell i of a context and a drug d, the model embeds the cell twice, with all its genes
observed: once with the drug in the place of its `<drug>` token, once with the control there. The cell decoder, which
reads any gene g from a cell embedding, gives the change

    change(g) = decoder(g, embedding(i, d)) - decoder(g, embedding(i, control))

in log(1 + counts per 10,000). The decoder is linear in the embedding, so that it is applied to the difference, and the
change of a condition is that of the mean difference over its control cells. Without a drug the change is zero. The
predicted profile is the mean profile of the control cells plus the change.

What is learnt. The target is the change of the condition's mean (see `drug_screen.py`); the control cells that it is
paired with are drawn anew in every epoch, from the same context and batch, by the seed. Minimised is the squared
error, over the genes and conditions, in units of the root mean square of the training changes. Trained are low-rank
adapters on the transformer and on the linear layers of the drug encoder, and the whole cell decoder.

Drugs that the base does not know are rows added to its drug table, made from their fingerprints (`drug_table.py`).

What is tested. Drugs that no training condition has, and contexts that none has: a model each. The means over the
training conditions of the same context, and of the same drug, and no change at all are scored beside it.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate import PartialState

from tahoex1_hf.configuration_tahoe_x1 import TahoeX1Config
from tahoex1_hf.encoding_tahoe_x1 import EncodedCells, matrix_rows, merge_repeats, mix64
from tahoex1_hf.finetuning.adapters import save_adapter
from tahoex1_hf.finetuning.bases import base_name, load_base, load_tokenizer
from tahoex1_hf.finetuning.cells.labelled import LabelledCells, read_cells
from tahoex1_hf.finetuning.config import DrugResponseConfig
from tahoex1_hf.finetuning.drugs.report import write_drug_report
from tahoex1_hf.finetuning.drugs.screen import Screen, read_screen
from tahoex1_hf.finetuning.drugs.table import new_fingerprints, teach_tokenizer
from tahoex1_hf.finetuning.fitting import drop_checkpoints, fit, read_result, run_task, write_result
from tahoex1_hf.finetuning.objectives import HELD_OUT, Objective
from tahoex1_hf.finetuning.runs import computes_in
from tahoex1_hf.finetuning.sampling import content_numbers
from tahoex1_hf.finetuning.splits import Split, make_splits, train_and_validation
from tahoex1_hf.finetuning.trainer import FinetuneTrainer
from tahoex1_hf.hub.adapters import find_adapter, is_peft, load_adapter, read_record
from tahoex1_hf.hub.added_drugs import add_drugs, save_added_drugs
from tahoex1_hf.hub.loading import find_model
from tahoex1_hf.inference.encoder import CellEncoder, DtypeName
from tahoex1_hf.modeling_tahoe_x1 import TahoeX1ForPreTraining
from tahoex1_hf.packing_tahoe_x1 import CellLayout
from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

logger = logging.getLogger(__name__)

_PREDICTION_CELLS = 64  # control cells that stand for a condition in predictions
_ENCODED_CELLS = 1024  # at a time


def inner_model(model: Any) -> TahoeX1ForPreTraining:
    """The model inside PEFT's and the launcher's wrappers."""
    model = model.module if hasattr(model, "module") and not hasattr(model, "config") else model
    return cast(TahoeX1ForPreTraining, model.get_base_model() if is_peft(model) else model)


def decode_change(model: TahoeX1ForPreTraining, differences: torch.Tensor, genes: torch.Tensor) -> torch.Tensor:
    """Changes of genes, `(cells, genes)`, from differences of cell embeddings, `(cells, width)`."""
    embeddings = model.tahoe.embeddings.gene_encoder(genes).unsqueeze(0)
    changes: torch.Tensor = model.cell_decoder(differences, embeddings, CellLayout(len(differences)))
    return changes


class DrugObjective(Objective):
    """Squared error of changes. A row is an example: `condition * controls_per_condition + draw`.

    Args:
        config: of the run.
        cells: of the screen.
        screen: its conditions.
        ids: `(conditions,)` drug ids, and that of the control.
        train: conditions to train on, which set the scale.
    """

    def __init__(
        self,
        config: DrugResponseConfig,
        cells: LabelledCells,
        screen: Screen,
        ids: tuple[np.ndarray, int],
        train: np.ndarray,
    ):
        self.config, self.collator, self.screen, self.source = config, None, screen, cells
        self.drug_ids, self.control_id = ids
        self.scale = float(np.sqrt((screen.changes[train].astype(np.float64) ** 2).mean())) or 1.0
        self.genes = torch.from_numpy(screen.genes)
        lengths = cells.lengths + 1  # the drug token
        of_group = np.array([lengths[group].mean() if len(group) else 0.0 for group in screen.control_cells])
        per_row = np.repeat(of_group[screen.controls], config.controls_per_condition)
        self.cells = cast(LabelledCells, SimpleNamespace(lengths=np.ceil(per_row).astype(np.int64)))

    def examples(self, conditions: np.ndarray) -> np.ndarray:
        """Rows of some conditions."""
        draws = self.config.controls_per_condition
        return (conditions[:, None] * draws + np.arange(draws)).ravel()

    def batch(self, rows: np.ndarray, epoch: int) -> dict[str, Any]:
        """Control cells with the drug, then the same with the control; and `changes`, in units of the scale."""
        conditions = rows // self.config.controls_per_condition
        key = mix64(mix64(np.array([self.config.seed], dtype=np.uint64)) + np.uint64(epoch))
        draws = mix64(key + rows.astype(np.uint64))
        groups = [self.screen.control_cells[self.screen.controls[condition]] for condition in conditions]
        numbers = np.array(
            [group[int(draw % np.uint64(len(group)))] for group, draw in zip(groups, draws, strict=True)]
        )
        tokenizer = self.source.tokenizer
        encoded = encode_cells(self.source, numbers, self.drug_ids[conditions], int(key[0] >> np.uint64(2)))
        pad_id = tokenizer.get_vocab()[str(tokenizer.pad_token)]
        once = encoded.padded(pad_token_id=pad_id, pad_value=tokenizer.pad_value)
        batch: dict[str, Any] = {name: torch.cat([tensor, tensor]) for name, tensor in once.items()}
        batch["drug_ids"][len(rows) :] = self.control_id
        batch["changes"] = torch.from_numpy(self.screen.changes[conditions] / self.scale)
        return batch

    def errors(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Mean squared error over the genes, `(cells,)`."""
        batch = dict(batch)
        truth = batch.pop("changes")
        treated, untreated = model(**batch).pooler_output.chunk(2)
        found = decode_change(inner_model(model), treated - untreated, self.genes.to(treated.device))
        return (found.float() - truth).square().mean(dim=1)

    def sums(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Sum of the errors, their number, and nothing: `(3,)` float64."""
        errors = self.errors(model, batch).double()
        return torch.stack([errors.sum(), errors.new_tensor(len(errors)), errors.new_zeros(())])

    def metrics(self, sums: torch.Tensor, num_cells: int) -> dict[str, float]:
        """The loss; that of no change is about 1."""
        return {"loss": float(sums[0] / sums[1])}


class DrugTrainer(FinetuneTrainer):
    """Trainer whose loss is made of pairs of cell embeddings."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the examples of this process, all of which have equally many."""
        loss = cast(DrugObjective, self.objective).errors(model, inputs).mean()
        return (loss, {}) if return_outputs else loss


def encode_cells(cells: LabelledCells, numbers: np.ndarray, drug_ids: np.ndarray, seed: int = 0) -> EncodedCells:
    """Cells of the file with a drug each."""
    rows = cells.stored.rows(numbers)
    return cells.tokenizer.encode_rows(
        rows, drug_ids=drug_ids, cell_numbers=content_numbers(rows), seed=seed, warn=lambda _: None
    )


@torch.inference_mode()
def mean_embedding(encoder: CellEncoder, cells: EncodedCells) -> torch.Tensor:
    """Mean of the cell embeddings, not normalised: `(width,)` float64."""
    total = torch.zeros(encoder.width, dtype=torch.float64)
    for _, pooled in encoder.pooled_batches(cells):
        total += pooled.double().sum(dim=0).cpu()
    return total / cells.num_cells


@dataclass(eq=False)
class DrugRun:
    """Cells, conditions, and how a model is made of a split."""

    config: DrugResponseConfig
    processes: PartialState

    def __post_init__(self) -> None:
        config = self.config
        self.folder = Path(config.output_dir)
        self.tokenizer = load_tokenizer(config)
        settings = TahoeX1Config.from_pretrained(find_model(config.model, size=config.size))
        self.num_known = int(settings.num_drugs)
        if not self.num_known:
            raise ValueError(
                f"model={config.model} has no drug encoder (num_drugs is 0): use one that has, such as the 3B model."
            )
        self.cells = read_cells(config, self.tokenizer, self.folder)
        self.screen = read_screen(config, self.cells)
        names = sorted({*self.screen.drugs})
        new = new_fingerprints(config, self.tokenizer, names)
        self.added = np.stack(list(new.values())) if new else None
        teach_tokenizer(self.tokenizer, list(new), self.num_known)
        table = self.tokenizer.drug_to_id or {}
        self.drug_ids = np.array([table[name] for name in self.screen.drugs], dtype=np.int64)
        self.control_id = int(table.get(str(config.control), 0))

    def base(self) -> TahoeX1ForPreTraining:
        """The base, with the drugs that it did not know."""
        model = load_base(self.config, TahoeX1ForPreTraining)
        if self.added is not None:
            add_drugs(model, self.added)
        return model

    def splits(self, kind: str) -> list[Split]:
        """Of the conditions, such that no drug (or no context) is in two parts."""
        config = self.config
        return make_splits(
            None,
            self.units(kind),
            num_rows=len(self.screen),
            folds=config.folds,
            test_fraction=config.test_fraction,
            validation_fraction=config.validation_fraction,
            seed=config.seed,
        )

    def units(self, kind: str) -> np.ndarray:
        """`(conditions,)` what is held out."""
        return self.screen.drugs if kind == "drug" else self.screen.contexts

    def whole(self) -> Split:
        """All conditions to train on, but for those that early stopping looks at."""
        rows, config = np.arange(len(self.screen)), self.config
        return train_and_validation(
            rows, None, self.units(config.held_out[0]), config.validation_fraction, config.seed
        )

    def outcome(self, split: Split, folder: Path, keep: bool) -> tuple[np.ndarray, dict[str, Any]]:
        """Train on a split and test: `(test conditions, genes)` changes, and the cost; once done, read again.

        Args:
            split: of the conditions.
            folder: of the model.
            keep: whether the model is the one to keep.
        """
        done = read_result(folder, split)
        if done is not None:
            return done[0]["changes"], done[1]
        ids = (self.drug_ids, self.control_id)
        objective = DrugObjective(self.config, self.cells, self.screen, ids, split.train)
        train, validation = objective.examples(split.train), objective.examples(split.validation)
        model, facts = fit(self.base, objective, train, validation, folder, self.processes, DrugTrainer)
        _in_units(inner_model(model), objective.scale)
        if self.processes.is_main_process:
            changes = self.predict(model, split.test)
            if keep:
                save_adapter(model, self.tokenizer, self.folder, self.record(facts))
                if self.added is not None and is_peft(model):
                    save_added_drugs(self.folder, self.added, self.num_known)
            write_result(folder, split, facts, changes=changes)
            drop_checkpoints(folder)
        self.processes.wait_for_everyone()
        arrays, facts = cast(tuple[dict[str, np.ndarray], dict[str, Any]], read_result(folder, split))
        return arrays["changes"], facts

    @torch.no_grad()
    def predict(self, model: Any, rows: np.ndarray) -> np.ndarray:
        """Changes of conditions, from up to 64 of their control cells: `(conditions, genes)` float32."""
        inner = inner_model(model)
        dtype = cast(DtypeName, computes_in(self.config))
        encoder = CellEncoder(inner, self.tokenizer, device=self.processes.device, dtype=dtype)
        genes = torch.from_numpy(self.screen.genes).to(encoder.device)
        untreated: dict[int, torch.Tensor] = {}
        changes = np.zeros((len(rows), len(genes)), dtype=np.float32)
        for place, row in enumerate(rows):
            group = int(self.screen.controls[row])
            numbers = _chosen(self.screen.control_cells[group], self.config.seed)
            if group not in untreated:
                ids = np.full(len(numbers), self.control_id)
                untreated[group] = mean_embedding(encoder, encode_cells(self.cells, numbers, ids))
            ids = np.full(len(numbers), self.drug_ids[row])
            treated = mean_embedding(encoder, encode_cells(self.cells, numbers, ids))
            difference = (treated - untreated[group]).float().to(encoder.device).unsqueeze(0)
            changes[place] = decode_change(inner, difference, genes)[0].float().cpu().numpy()
        return changes

    def record(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What finetuning.json says."""
        config = self.config
        kept = ("task", "method", "size", "layer", "gene_id_column", "drugs", "control", "context", "batch", "seed")
        names = {token: name for name, token in self.tokenizer.get_vocab().items()}
        costs = ("seconds", "peak_memory_gb")
        return {
            **{name: getattr(config, name, None) for name in kept},
            "label": None,
            "model": base_name(config),
            "context_length": self.tokenizer.context_length,
            "classes": None,
            "model_options": {},
            "training_cells": len(self.cells),
            "control_id": self.control_id,
            "response_genes": [names[int(token)] for token in self.screen.genes],
            **{name: value for name, value in facts.items() if name not in costs},
        }


def _chosen(group: np.ndarray, seed: int) -> np.ndarray:
    """Some of a group's cells, always the same."""
    scores = mix64(mix64(np.array([seed], dtype=np.uint64)) + np.uint64(HELD_OUT) + group.astype(np.uint64))
    return np.sort(group[np.argsort(scores)[:_PREDICTION_CELLS]])


@torch.no_grad()
def _in_units(model: TahoeX1ForPreTraining, scale: float) -> None:
    """Let a decoder that learnt changes in units of `scale` give them as they are."""
    decoder: Any = model.cell_decoder
    trained = decoder.modules_to_save["default"] if hasattr(decoder, "modules_to_save") else decoder
    trained.cell_proj.weight.mul_(scale)


def finetune_drugs(config: DrugResponseConfig) -> int:
    """Run, or go on with a run, to its end.

    Args:
        config: of the run, with `task=drug_response`. Every process of a launcher calls this with the same.

    Returns:
        0; or 75 where SIGTERM ended it after a checkpoint: give the same command again.

    Raises:
        FileNotFoundError: for a model or a file that cannot be found.
        ValueError: for settings, cells or drugs that do not fit.
    """

    def work(processes: PartialState) -> dict[str, Any]:
        run = DrugRun(config, processes)
        splits: dict[str, list[Split]] = {kind: run.splits(kind) for kind in config.held_out}
        alone = config.folds == 1 and len(splits) == 1
        outcomes: dict[str, list[tuple[np.ndarray, dict[str, Any]]]] = {}
        for kind, of_kind in splits.items():
            for number, split in enumerate(of_kind):
                folder = run.folder if alone else run.folder / "folds" / f"{kind}-{number}"
                logger.info("Held out by %s: model %d of %d.", kind, number + 1, len(of_kind))
                outcomes.setdefault(kind, []).append(run.outcome(split, folder, keep=alone))
        if not alone:
            logger.info("The model to keep, of all conditions.")
            run.outcome(run.whole(), run.folder, keep=True)
        if not config.report or not processes.is_main_process:
            return {}
        return write_drug_report(run.folder, config, run.screen, run.tokenizer, splits, outcomes)

    return run_task(config, work)


@torch.no_grad()
def predict_drug_response(
    adapter: str | Path, controls: "AnnData", drugs: list[str], base: str | Path | None = None
) -> "pd.DataFrame":
    """Changes that drugs would make in a population of cells.

    Args:
        adapter: folder or Hub id of a model trained with `task=drug_response`.
        controls: untreated cells of one context, with raw counts; all of them are looked at.
        drugs: names in the tokenizer's drug table.
        base: where the base is now; by default it is where the adapter says.

    Returns:
        Drugs x genes (Ensembl ids): change of the mean of log(1 + counts per 10,000).

    Raises:
        ValueError: for an adapter of another task, and for unknown drugs.
    """
    import pandas as pd

    folder = find_adapter(adapter)
    record = read_record(folder)
    if record.get("task") != "drug_response":
        raise ValueError(f"adapter={adapter} was trained for {record.get('task')}, not for drug_response.")
    loaded, tokenizer = load_adapter(folder, base)
    model = inner_model(loaded)
    encoder = CellEncoder(model, tokenizer, dtype="float32")
    matrix, match = tokenizer.read_anndata(controls, record.get("gene_id_column"), record.get("layer"))
    vocabulary = tokenizer.get_vocab()
    genes = torch.tensor([vocabulary[gene] for gene in record["response_genes"]], device=encoder.device)

    def mean(drug_id: int) -> torch.Tensor:
        total = torch.zeros(encoder.width, dtype=torch.float64)
        for start in range(0, controls.n_obs, _ENCODED_CELLS):
            cells = _with_drug(tokenizer, matrix[start : start + _ENCODED_CELLS], match, drug_id)
            total += mean_embedding(encoder, cells) * cells.num_cells
        return total / controls.n_obs

    ids = tokenizer.drug_ids(drugs, len(drugs))
    untreated = mean(int(record["control_id"]))
    differences = torch.stack([mean(int(drug)) - untreated for drug in ids]).float().to(encoder.device)
    changes = decode_change(model, differences, genes).float().cpu().numpy()
    return pd.DataFrame(changes, index=list(drugs), columns=record["response_genes"])


def _with_drug(tokenizer: TahoeX1Tokenizer, counts: Any, genes: Any, drug_id: int) -> EncodedCells:
    rows, repeats = matrix_rows(counts, genes)
    ids = np.full(len(rows.offsets) - 1, drug_id, dtype=np.int64)
    if repeats:
        rows = merge_repeats(rows)
    return tokenizer.encode_rows(rows, drug_ids=ids, cell_numbers=content_numbers(rows))
