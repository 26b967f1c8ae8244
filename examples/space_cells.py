"""Make the reference and the example of a Space from the 700 human PBMCs that come with scanpy.

scanpy is under the BSD-3-Clause licence, and the cells, some of 10x Genomics' 68k PBMCs (Zheng et al. 2017), are
under CC BY 4.0, so both may be shown in public. 500 cells, chosen at random, are the reference, and the other 200 the
example. They are of one experiment, so labels carry over more easily than from one study to another.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from anndata import AnnData
from demo_cells import LABELS, load_cells, load_gene_symbols

REFERENCE_CELLS = 500


def space_cells() -> tuple[AnnData, AnnData]:
    """Return the reference, with `obs["cell_type"]`, and the example without labels; genes by Ensembl id."""
    cells, ids = load_cells(), load_gene_symbols()
    cells = cells[:, [symbol in ids for symbol in cells.var_names]].copy()
    cells.var["gene_symbol"] = cells.var_names.to_numpy()
    cells.var_names = [ids[symbol] for symbol in cells.var_names]
    cells.obs = pd.DataFrame({"cell_type": cells.obs[LABELS].astype(str)}, index=cells.obs_names)
    order = np.random.default_rng(0).permutation(cells.n_obs)
    reference, example = cells[order[:REFERENCE_CELLS]].copy(), cells[order[REFERENCE_CELLS:]].copy()
    example.obs = example.obs[[]]
    return reference, example


def main(folder: Annotated[Path, typer.Argument(help="Folder for reference.h5ad and example.h5ad.")]) -> None:
    """Write reference.h5ad and example.h5ad into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, cells in zip(("reference", "example"), space_cells(), strict=True):
        cells.write_h5ad(folder / f"{name}.h5ad", compression="gzip")


if __name__ == "__main__":
    typer.run(main)
