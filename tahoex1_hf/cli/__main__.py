# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Run the command `tahoex1`: `python -m tahoex1_hf.cli`."""

from tahoex1_hf.cli.app import app

if __name__ == "__main__":
    app(prog_name="tahoex1")
