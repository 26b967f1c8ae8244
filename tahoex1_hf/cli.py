"""The command `tahoex1`."""

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tahoex1_hf.data_cli import build_vocab, drug_fingerprints_command
from tahoex1_hf.prepare_cli import prepare

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Dtype(StrEnum):
    """Precision of the matrix products."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


@app.callback()
def main() -> None:
    """Tahoe-x1 single-cell foundation models."""


@app.command()
def embed(
    source: Annotated[Path, typer.Argument(metavar="IN.h5ad", help="Cells with raw counts.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help=".h5ad (the input plus the embeddings), .parquet or .npy.")
    ],
    model: Annotated[
        str, typer.Option(help="Folder or Hub repository of the model, converted or in the original's layout.")
    ],
    size: Annotated[str | None, typer.Option(help="Which size, where there are several: 70m, 1b, 3b.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")] = None,
    gene_id_column: Annotated[
        str | None, typer.Option(help="Column of var with Ensembl ids.", show_default="var_names")
    ] = None,
    gene_symbols: Annotated[
        Path | None, typer.Option(help="CSV with the columns symbol, Ensembl id, for genes named by symbol.")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Layer with the counts.", show_default="X")] = None,
    drugs: Annotated[str | None, typer.Option(help="Column of obs with drugs, or one drug for all cells.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens per cell.", show_default="the model's context")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: bfloat16 where the hardware is faster at it.")] = Dtype.auto,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu.", show_default="the fastest there is")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens per batch; less needs less memory.", show_default="fit for the device")
    ] = None,
    gene_embeddings: Annotated[bool, typer.Option("--gene-embeddings", help="Also mean gene embeddings.")] = False,
    key_added: Annotated[str, typer.Option(help="Slot of obsm to write.")] = "X_tahoe_x1",
    seed: Annotated[int, typer.Option(help="Seed of the sampling of cells longer than the context.")] = 0,
) -> None:
    """Embed the cells of an .h5ad file, of any size."""
    # What the command needs is imported here, so that --help answers at once.
    from tahoex1_hf.embed_file import check_output, embed_h5ad
    from tahoex1_hf.model_loading import load_model_and_tokenizer
    from tahoex1_hf.reading import read_gene_symbols

    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        check_output(output, gene_embeddings)
        if not source.is_file():
            raise FileNotFoundError(f"{source} does not exist, or is not a file.")
        loaded, tokenizer = load_model_and_tokenizer(model, size=size, revision=revision)
        embed_h5ad(
            source,
            output,
            loaded,
            tokenizer,
            key_added=key_added,
            layer=layer,
            gene_id_column=gene_id_column,
            gene_symbols=read_gene_symbols(gene_symbols),
            drugs=drugs,
            gene_embeddings=gene_embeddings,
            max_length=max_length,
            seed=seed,
            batch_tokens=batch_tokens,
            device=device,
            dtype=dtype.value,
        )
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"Wrote {output}")


app.command()(prepare)
app.command("build-vocab")(build_vocab)
app.command("drug-fingerprints")(drug_fingerprints_command)


if __name__ == "__main__":
    app()
