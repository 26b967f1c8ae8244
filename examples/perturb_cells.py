"""Rank the genes that tell cytotoxic T cells from naive ones: delete each gene, and see which way the cells move.

No network is needed: the cells come with scanpy, and the default model is the small one beside this file.
"""

from pathlib import Path
from typing import Annotated

import typer
from demo_cells import LABELS, load_cells, load_gene_symbols

from tahoex1_hf import perturb_genes
from tahoex1_hf.perturbation.plot import plot_ranking
from tahoex1_hf.perturbation.tables import write_table

CHECKPOINT = Path(__file__).resolve().with_name("demo_checkpoint")
CYTOTOXIC, NAIVE = "CD8+ Cytotoxic T", "CD8+/CD45RA+ Naive Cytotoxic"


def main(
    output_dir: Annotated[Path, typer.Option(help="Folder for the table and the picture.")] = Path("demo_output"),
    model: Annotated[str, typer.Option(help="Folder or Hub repository of the model.")] = str(CHECKPOINT),
    genes: Annotated[str, typer.Option(help='Symbols separated by commas, or "all" expressed genes.')] = "all",
    null_genes: Annotated[
        int, typer.Option(help="Number of genes of similar expression to compare each gene with.")
    ] = 100,
    most_null_genes: Annotated[
        int | None,
        typer.Option(
            help="Most such genes for a gene that few of them match; their number is doubled until ten do.",
            show_default="20 times --null-genes",
        ),
    ] = None,
) -> None:
    """Rank deletions in cytotoxic T cells by how far they move the cells toward naive ones."""
    output_dir.mkdir(parents=True, exist_ok=True)
    table = perturb_genes(
        load_cells(),
        model,
        genes="all" if genes == "all" else genes.split(","),
        gene_symbols=load_gene_symbols(),
        cells=f'{LABELS} == "{CYTOTOXIC}"',
        target=f'{LABELS} == "{NAIVE}"',
        null_genes=null_genes,
        most_null_genes=most_null_genes,
        partial=output_dir / "perturbation.partial",
    ).table
    write_table(table, output_dir / "perturbation.csv")
    plot_ranking(table, output_dir / "perturbation.png")
    (output_dir / "perturbation.partial").unlink()
    columns = ["gene", "n_cells_changed", "target_change", "target_change_se", "null_mean", "null_sd", "z_score"]
    typer.echo(f"Deleted in {CYTOTOXIC} cells; change of the cosine to the mean of {NAIVE} cells:")
    typer.echo(table[columns].head(10).to_string(index=False, float_format="{:.4g}".format))
    typer.echo(f"Wrote {output_dir / 'perturbation.csv'} and {output_dir / 'perturbation.png'}")


if __name__ == "__main__":
    typer.run(main)
