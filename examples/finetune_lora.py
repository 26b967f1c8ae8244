"""Adapt a Tahoe-x1 model to your cells: the command `tahoex1 finetune` as a script.

    accelerate launch examples/finetune_lora.py classification data=FILE.h5ad label=COLUMN model=PATH output_dir=DIR

is the same as `accelerate launch -m tahoex1_hf finetune classification data=FILE.h5ad ...`. Afterwards
`tahoex1_hf.load_adapter(output_dir)` loads the result.
"""

import typer

from tahoex1_hf.cli.finetune import finetune

if __name__ == "__main__":
    typer.run(finetune)
