# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The card of an adapter: its purpose, training and results, and how to load it."""

from pathlib import Path
from typing import Any

import yaml

_METHODS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "rslora": "rank-stabilised LoRA",
    "qlora": "LoRA on a quantised base",
    "full": "full fine-tuning",
    "linear_probe": "a linear probe (the base is frozen, the head fitted by scikit-learn)",
    "head_only": "gradient training of the head alone",
}


# Plural nouns for the tested things, for tasks that do not test cells.
_TESTED = {"gene_classification": "genes", "drug_response": "conditions"}
_DRUG_USAGE = """## Use

```python
from tahoex1_hf.finetuning.drugs.predicting import predict_drug_response

changes = predict_drug_response("FOLDER OR HUB ID OF THIS ADAPTER", controls, ["NAME OF A DRUG"])
```

`controls` is an AnnData with untreated cells of one context; `changes` has a row per drug and a column per gene, the
change of the mean of log(1 + counts per 10,000)."""


_GENE_USAGE = """## Use

```python
from tahoex1_hf.finetuning.genes.predicting import predict_gene_classes

table = predict_gene_classes("FOLDER OR HUB ID OF THIS ADAPTER", adata)
```

`table` has a row for every gene that some cell of `adata` (raw counts) expresses. Its class follows from the mean of
its logits over these cells. `load_adapter(FOLDER)` of `tahoex1_hf` gives the model, a
`TahoeX1ForTokenClassification`, and the tokenizer."""

_CELL_USAGE = """## Use

```sh
tahoex1 predict IN.h5ad OUT.h5ad --adapter "FOLDER OR HUB ID OF THIS ADAPTER"
```

```python
from tahoex1_hf import load_adapter

model, tokenizer = load_adapter("FOLDER OR HUB ID OF THIS ADAPTER")
logits = model(**tokenizer(adata, padding=True, return_tensors="pt")).logits
```"""
_EMBEDDING_USAGE = """## Use

```python
from tahoex1_hf import embed_anndata
from tahoex1_hf import load_adapter

model, tokenizer = load_adapter("FOLDER OR HUB ID OF THIS ADAPTER")
merged = model.merge_and_unload()
embed_anndata(adata, merged, tokenizer)
merged.save_pretrained("FOLDER"), tokenizer.save_pretrained("FOLDER")  # a base to train further on
```"""


def adapter_card(record: dict[str, Any]) -> str:
    """Return the text of README.md.

    Args:
        record: Content of `finetuning.json`.
    """
    base = record["model"]
    metadata: dict[str, Any] = {
        "library_name": "transformers" if record["method"] == "full" else "peft",
        "tags": ["tahoe-x1", "single-cell", record["task"].replace("_", "-")],
    }
    local = Path(base).is_absolute()
    if not local:  # a folder of this machine would mean nothing on the Hub
        metadata["base_model"] = base
    name = Path(base).name if local else base
    shown = f"{name} ({record['size']})" if record.get("size") else name
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# Tahoe-x1 {record['task'].replace('_', ' ')}{_title_suffix(record)}",
        f"Made by {_METHODS[record['method']]} on `{shown}`.",
        _facts(record),
        _labels(record),
        _scores(record),
        _usage(record),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _title_suffix(record: dict[str, Any]) -> str:
    return f": {record['label']}" if record.get("label") else ""


def _facts(record: dict[str, Any]) -> str:
    facts = {
        "Trained with": f"tahoex1_hf {record['package_version']}",
        "Training cells": record.get("training_cells"),
        "Steps": record.get("steps"),
        "Trainable parameters": f"{record['trainable_parameters']:,}" if "trainable_parameters" in record else None,
        "Counts from": f"layer {record['layer']}" if record.get("layer") else None,
        "Most tokens of a cell": record.get("context_length"),
    }
    lines = [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _labels(record: dict[str, Any]) -> str:
    classes = record.get("classes")
    if not classes:
        return ""
    shown = ", ".join(classes[:60]) + (f" and {len(classes) - 60} more" if len(classes) > 60 else "")
    return f"## Classes\n\n{shown}"


def _scores(record: dict[str, Any]) -> str:
    scores = record.get("metrics")
    if not scores:
        return ""
    lines = [f"| {name} | {value:.4g} |" for name, value in scores.items()]
    return "\n".join(
        [
            f"## Results on {_TESTED.get(record['task'], 'cells')} that were not trained on",
            "",
            record["verdict"],
            "",
            "| metric | value |",
            "|---|---|",
            *lines,
        ]
    )


def _usage(record: dict[str, Any]) -> str:
    if record["task"] == "drug_response":
        return _DRUG_USAGE
    if record["task"] == "gene_classification":
        return _GENE_USAGE
    use = _EMBEDDING_USAGE if record["task"] == "masked_expression" else _CELL_USAGE
    if record["method"] == "full":  # there is nothing to merge
        lines = [line for line in use.splitlines() if not line.startswith("merged")]
        return "\n".join(lines).replace("merged", "model")
    return f"""{use}

With PEFT and transformers alone: `PeftModel.from_pretrained(base, folder)`, where `base` is a
`{record["model_class"]}` loaded with the `model_options` of `finetuning.json`."""
