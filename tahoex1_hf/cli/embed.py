"""The command `tahoex1 embed`."""

import logging
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """Precision of the matrix products."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


def embed(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="IN...",
            help="Cells with raw counts: .h5ad, .zarr, 10x files, folders of them, globs; datasets that tahoex1 "
            "prepare made, local or hf://, s3://; Hub datasets like tahoebio/Tahoe-100M.",
        ),
    ],
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help=".h5ad (of one .h5ad: the input plus the embeddings), .parquet or .npy (also s3://)."
        ),
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
    gene_metadata: Annotated[
        str | None, typer.Option(help="Gene table of files like Tahoe-100M's.", show_default="Tahoe-100M's own")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Layer with the counts.", show_default="X")] = None,
    drugs: Annotated[str | None, typer.Option(help="Column of obs with drugs, or one drug for all cells.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens per cell.", show_default="the model's context")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="auto: bfloat16 where the hardware is faster at it. int8: weights of eight bits.")
    ] = Dtype.auto,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu.", show_default="the fastest there is")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens per batch; less needs less memory.", show_default="fit for the device")
    ] = None,
    gene_embeddings: Annotated[bool, typer.Option("--gene-embeddings", help="Also mean gene embeddings.")] = False,
    key_added: Annotated[str, typer.Option(help="Slot of obsm to write.")] = "X_tahoe_x1",
    seed: Annotated[int, typer.Option(help="Seed of the sampling of cells longer than the context.")] = 0,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an unfinished run with other settings left.")
    ] = False,
) -> None:
    """Embed the cells of files of any size.

    A run that was stopped goes on where it was when the same command is given again. With
    `accelerate launch -m tahoex1_hf embed ...` several processes, or machines, share the work.
    """
    # What the command needs is imported here, so that --help answers at once.
    try:
        from tahoex1_hf.cells.files import check_paths
        from tahoex1_hf.embedding.files import embed_files
        from tahoex1_hf.embedding.writers import check_output
    except ImportError as error:
        typer.echo(f"Error: {error.name} is missing: pip install 'tahoex1_hf[data]'.", err=True)
        raise typer.Exit(1) from None
    from tahoex1_hf.cells.gene_symbols import read_gene_symbols
    from tahoex1_hf.hub.loading import load_model_and_tokenizer

    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        check_output(output, gene_embeddings)
        check_paths(sources)
        loaded, tokenizer = load_model_and_tokenizer(model, size=size, revision=revision)
        embed_files(
            sources,
            output,
            loaded,
            tokenizer,
            key_added=key_added,
            layer=layer,
            gene_id_column=gene_id_column,
            gene_symbols=read_gene_symbols(gene_symbols),
            gene_metadata=gene_metadata,
            drugs=drugs,
            gene_embeddings=gene_embeddings,
            max_length=max_length,
            seed=seed,
            batch_tokens=batch_tokens,
            device=device,
            dtype=dtype.value,
            restart=restart,
        )
    except (ImportError, OSError, ValueError) as error:  # ImportError: names the extra
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("Stopped. The same command goes on from here.", err=True)
        raise typer.Exit(130) from None
    if first:
        typer.echo(f"Wrote {output}")
