"""Pretrain a Tahoe-x1 model: the command `tahoex1 pretrain` as a script.

    accelerate launch examples/pretrain.py debug dataset=DIR output_dir=DIR

is the same as `accelerate launch -m tahoex1_hf pretrain debug dataset=DIR output_dir=DIR`. The launcher decides how
many devices share the work, and how: `accelerate launch --config_file examples/configs/accelerate/fsdp2.yaml`.
"""

import typer

from tahoex1_hf.cli.pretrain import pretrain

if __name__ == "__main__":
    typer.run(pretrain)
