# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Delay work until a module is imported, so that unused modules cost nothing."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Watcher(MetaPathFinder):
    """A finder that finds nothing by itself, but sees which modules are imported."""

    def __init__(self) -> None:
        self.actions: dict[str, Callable[[], None]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        action = self.actions.get(name)
        if action is None:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_act(module: ModuleType) -> None:
            run(module)
            action()

        spec.loader.exec_module = run_and_act  # type: ignore[method-assign]
        return spec


_WATCHER = _Watcher()


def call_after_import(name: str, action: Callable[[], None]) -> None:
    """Call a function as soon as a module has been imported, or at once if it has been imported already.

    Args:
        name: Full name of the module.
        action: Function without arguments. It runs when the module's own code has run to its end, and again after a
            reload. It may import modules that do not need a module which is just importing this one.
    """
    if _WATCHER not in sys.meta_path:
        sys.meta_path.insert(0, _WATCHER)
    _WATCHER.actions[name] = action
    if name in sys.modules:
        action()
