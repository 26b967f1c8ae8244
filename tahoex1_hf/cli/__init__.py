# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1`: `from tahoex1_hf.cli import app` gives the Typer app, as it did when this was one module."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tahoex1_hf.cli.app import app

    globals()["app"] = app  # importing the module of that name has put the module here
    return app
