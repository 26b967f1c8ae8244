# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""A fine-tuning run from its configuration: which task does the work."""

from tahoex1_hf.finetuning.config import FinetuneConfig


def finetune(config: FinetuneConfig) -> int:
    """Run, or go on with a run, to its end.

    Args:
        config: of the run. Every process of a launcher calls this with the same.

    Returns:
        0; or 75 where SIGTERM ended it after a checkpoint: give the same command again.

    Raises:
        FileNotFoundError: for a model or a file that cannot be found.
        ValueError: for settings or data that do not fit.
    """
    match config.task:
        case "gene_classification":
            from tahoex1_hf.finetuning.genes.task import finetune_genes

            return finetune_genes(config)
        case "drug_response":
            from tahoex1_hf.finetuning.drugs.task import finetune_drugs

            return finetune_drugs(config)
        case _:
            from tahoex1_hf.finetuning.cells.task import finetune_cells

            return finetune_cells(config)
