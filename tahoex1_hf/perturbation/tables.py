# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Tables of finished perturbations: ranked, compared with their controls, and written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tahoex1_hf.common.files import WholeFile
from tahoex1_hf.perturbation.plan import Task

if TYPE_CHECKING:
    from pandas import DataFrame

    from tahoex1_hf.perturbation.nulls import Pools
    from tahoex1_hf.tokenization_tahoe_x1 import TahoeX1Tokenizer

_MEASURES = ("cosine_distance", "euclidean_shift", "target_change", "predicted_abs_change", "predicted_change")
_NULL = ("n_null", "null_mean", "null_sd", "z_score", "p_value", "q_value")
_FORMATS = (".csv", ".parquet")


def compared(observed: float, null: np.ndarray, two_sided: bool) -> dict[str, float]:
    """Compare a shift with the shifts of its controls.

    Args:
        observed: Mean shift of the perturbation.
        null: `(controls,)` mean shifts of the controls.
        two_sided: Whether shifts are extreme in both directions from the controls' median, or upwards only.

    Returns:
        `n_null`, `null_mean`, `null_sd`, `z_score` and `p_value`, NaN where there are too few controls. `p_value` is
        (1 + controls that are as extreme) / (1 + controls): the observed shift counts as one of them (North, Curtis
        and Sham 2002, doi:10.1086/341527).
    """
    null = null[np.isfinite(null)]
    values = {"n_null": len(null)} | dict.fromkeys(_NULL[1:5], float("nan"))
    if not len(null) or not np.isfinite(observed):
        return values
    values["null_mean"] = float(null.mean())
    if len(null) > 1:
        values["null_sd"] = float(null.std(ddof=1))
        if values["null_sd"] > 0:
            values["z_score"] = (observed - values["null_mean"]) / values["null_sd"]
    middle = np.median(null)
    extreme = (np.abs(null - middle) >= abs(observed - middle)) if two_sided else null >= observed
    values["p_value"] = float((1 + extreme.sum()) / (1 + len(null)))
    return values


def interval(mean: float, error: float, number: int) -> dict[str, float]:
    """Return `lower` and `upper`, the 95 % interval of a mean over cells by Student's t; NaN for fewer than two."""
    from scipy.stats import t

    half = float(t.ppf(0.975, number - 1)) * error if number > 1 else float("nan")
    return {"lower": mean - half, "upper": mean + half}


def ranked_table(
    finished: Mapping[Task, Mapping[str, Any]],
    controls: Mapping[Task, Sequence[Task]],
    group_names: Sequence[str],
    labels: Mapping[int, str],
    tokenizer: "TahoeX1Tokenizer",
    nearest: int,
    min_cells: int,
    pools: "Pools",
) -> "DataFrame":
    """Make the table that `PerturbationResult` describes.

    Args:
        finished: Measures of each perturbation.
        controls: Perturbations that were asked for, and the controls of each.
        group_names: Names of the groups.
        labels: Mapping from token to name of the gene.
        tokenizer: Tokenizer, for the Ensembl ids.
        nearest: Number of controls, the nearest, whose mean and standard deviation the table has.
        min_cells: Fewest changed cells of a perturbation that is compared with controls.
        pools: Null effects, from which the p values are.
    """
    import pandas as pd
    from scipy.stats import false_discovery_control

    ranking = pools.ranking
    rows = []
    for task, others in controls.items():
        record = finished[task]
        row: dict[str, Any] = {
            "_group": task.group,
            "_few": record["n_cells_changed"] < min_cells,
            "group": group_names[task.group],
            "gene": "+".join(labels[token] for token in task.genes),
            "gene_id": "+".join(tokenizer.convert_ids_to_tokens(list(task.genes))),
            **{name: record[name] for name in ("n_cells", "n_cells_expressing", "n_cells_changed")},
        }
        for name in _MEASURES:
            if name in record:
                row[name], row[f"{name}_se"] = record[name]
        # The mean over a few cells scatters more than the controls' means over many: the two are not compared.
        others = [] if row["_few"] else others
        null = np.array([finished[other][ranking][0] for other in others[:nearest]], dtype=np.float64)
        row |= interval(row[ranking], row[f"{ranking}_se"], record["n_cells_changed"])
        row |= compared(row[ranking], null, two_sided=ranking == "target_change")
        if others:
            tested = pools.test(task, others)
            row |= {"p_value": tested.p_value, "n_pooled": tested.n_null, "p_method": tested.method}
        else:
            row |= {"n_pooled": 0, "p_method": ""}
        rows.append(row)
    table = pd.DataFrame(rows).sort_values(["_group", "_few", ranking], ascending=[True, True, False])
    table = table.reset_index(drop=True)
    table.insert(3, "rank", table.groupby("_group").cumcount() + 1)
    table["q_value"] = np.nan
    tested = table["p_value"].notna()
    if tested.any():
        table.loc[tested, "q_value"] = false_discovery_control(table.loc[tested, "p_value"].to_numpy())
    return table.drop(columns=["_group", "_few"])


def affected_table(
    finished: Mapping[Task, Mapping[str, Any]],
    tasks: Sequence[Task],
    group_names: Sequence[str],
    labels: Mapping[int, str],
    tokenizer: "TahoeX1Tokenizer",
) -> "DataFrame":
    """Make the table of the genes most affected by each perturbation, in the order of the effect."""
    import pandas as pd

    columns = ["group", "gene", "gene_id", "affected_gene", "affected_gene_id"]
    columns += ["mean_change", "standard_error", "n_cells"]
    rows = []
    for task in tasks:
        gene = "+".join(labels[token] for token in task.genes)
        gene_id = "+".join(tokenizer.convert_ids_to_tokens(list(task.genes)))
        for token, mean, error, count in finished[task]["affected"]:
            name = tokenizer.convert_ids_to_tokens(int(token))
            rows.append([group_names[task.group], gene, gene_id, labels[token], name, mean, error, count])
    return pd.DataFrame(rows, columns=columns)


def check_table(path: str | Path) -> None:
    """Raise ValueError before any work is done if the table could not be written."""
    if Path(path).suffix not in _FORMATS:
        raise ValueError(f"{path}: a table must end in .csv or .parquet.")
    if not Path(path).parent.is_dir():
        raise ValueError(f"The folder {Path(path).parent} of {path} does not exist.")


def write_table(table: "DataFrame", path: str | Path) -> None:
    """Write a table as CSV or Parquet, by the ending of its name; the file appears when it is complete."""
    check_table(path)
    with WholeFile(path) as partial:
        if Path(path).suffix == ".csv":
            table.to_csv(partial, index=False)
        else:
            table.to_parquet(partial, index=False)
