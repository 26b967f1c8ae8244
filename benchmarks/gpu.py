"""The check of a machine with a CUDA GPU: `python -m benchmarks gpu right`, then `python -m benchmarks gpu cost`.

Two pieces, of at most seven minutes each: machines with GPUs are often lent for that long. Rows are written as they
are found, so that a piece that is cut short loses none.
"""

import platform
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer

from benchmarks import gpu_cost, gpu_right
from benchmarks.gpu_measuring import Check, rendered
from tahoex1_hf.common.cuda_memory import let_segments_grow


class Piece(StrEnum):
    """Pieces of the check, in the order in which they are to be run."""

    right = "right"
    cost = "cost"


PIECES: dict[Piece, Callable[[Check], None]] = {Piece.right: gpu_right.check, Piece.cost: gpu_cost.check}


def main(
    piece: Annotated[Piece, typer.Argument(help="right: numbers beside float64. cost: speed and memory.")],
    output: Annotated[Path, typer.Option(help="Folder for the rows, gpu-PIECE.jsonl.")] = Path(__file__).parent
    / "results",
    seconds: Annotated[float, typer.Option(min=10, help="Seconds after which nothing more is begun.")] = 360,
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny sizes on a CPU, to check that all of it works.")] = False,
) -> None:
    """Check a GPU: what is right first, what it costs then."""
    if not tiny and not torch.cuda.is_available():
        raise typer.BadParameter("There is no CUDA GPU here: pass --tiny to see that the check works.")
    let_segments_grow()
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"gpu-{piece}.jsonl"
    path.unlink(missing_ok=True)
    run = Check(torch.device("cpu" if tiny else "cuda"), tiny, path, seconds)
    device = "CPU, tiny sizes" if tiny else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    run.row("machine", device=device, python=platform.python_version(), **versions)
    PIECES[piece](run)
    print("\n".join(rendered(row) for row in run.rows))
    wrong = [row for row in run.rows if row.get("ok") is False]
    print(f"\n{len(run.rows)} rows in {path}, {len(wrong)} wrong")
    if wrong:
        raise typer.Exit(1)
