# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Which features of an input are genes, and not antibodies, guides or peaks that were measured with them."""

from collections import Counter
from typing import Any

import numpy as np

from tahoex1_hf.cells.gene_names import text_of

_COLUMNS = ("feature_types", "feature_type", "modality")
GENE_EXPRESSION = "Gene Expression"
# What Cell Ranger, muon and others call features that are no genes, in lower case. CELLxGENE has kinds of genes in a
# column feature_type (protein_coding ...), and these stay.
_OTHERS = {
    *(
        "antibody capture",
        "antibody",
        "antibodies",
        "antibody-derived tags",
        "adt",
        "hto",
        "hashtag",
        "protein",
        "prot",
    ),
    *("antigen capture", "crispr guide capture", "guide", "guides", "sgrna", "multiplexing capture", "multiplexing"),
    *("peaks", "peak", "atac", "chromatin accessibility", "custom", "vdj", "vdj-t", "vdj-b"),
}


def gene_mask(var: Any, number: int) -> tuple[np.ndarray, dict[str, int]]:
    """Tell genes from other features by the column `feature_types`, if there is one.

    Where some features are "Gene Expression", all others are no genes; otherwise those of a known other kind are not.

    Args:
        var: table with a row per feature: has `columns`, and gives one by `[]`.
        number: number of features.

    Returns:
        `(features,)` bool, and how many features of each other kind there are.
    """
    for column in _COLUMNS:
        if column not in var.columns:
            continue
        kinds = np.array([text_of(kind) for kind in var[column]], dtype=object)
        lower = np.array([kind.lower() for kind in kinds], dtype=object)
        genes = lower == GENE_EXPRESSION.lower()
        if not genes.any():
            genes = ~np.isin(lower, list(_OTHERS))
        if not genes.all():
            return genes, dict(Counter(kinds[~genes].tolist()).most_common())
    return np.ones(number, dtype=bool), {}
