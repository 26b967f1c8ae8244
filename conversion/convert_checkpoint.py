"""Convert a checkpoint of the original program, or back: the command `tahoex1 convert` as a script.

python conversion/convert_checkpoint.py SRC DST [--size 70m|1b|3b] [--dtype float32|bfloat16]
python conversion/convert_checkpoint.py CONVERTED DST --to-original
"""

import typer

from tahoex1_hf.cli.convert import convert

if __name__ == "__main__":
    typer.run(convert)
