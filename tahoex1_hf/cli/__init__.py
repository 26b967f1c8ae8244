# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tahoex1`: `from tahoex1_hf.cli import app` gives the Typer app, as it did when this was one module."""

import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """This package, in which the name `app` is the Typer app, and not the module of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python's import sets the attribute once the module has run.
        super().__setattr__(name, value.app if name == "app" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tahoex1_hf.cli.app import app

    return app
