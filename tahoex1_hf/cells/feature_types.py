# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Recognition of the features that are genes, and not antibodies, guides or peaks measured together with them."""

from collections import Counter
from typing import Any

import numpy as np

from tahoex1_hf.cells.gene_names import text_of

_COLUMNS = ("feature_types", "feature_type", "modality")
GENE_EXPRESSION = "Gene Expression"
# Types of features other than genes, as Cell Ranger, muon and others name them, in lower case. The column
# feature_type of CELLxGENE holds types of genes (protein_coding ...), which are kept.
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

    If some features have the type "Gene Expression", these are the genes. Otherwise all features are genes except
    those of another known type.

    Args:
        var: Table with one row per feature, with `columns`, and with access to a column by `[]`.
        number: Number of features.

    Returns:
        `(features,)` bool mask of the genes, and the number of features of each other type.
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
