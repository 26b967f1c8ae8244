# Copyright 2026 The tahoex1_hf authors. Licensed under the Apache License, Version 2.0.
"""Progress bars that can be switched off from outside."""

import os
from typing import Any

from tqdm.auto import tqdm


def progress_bar(shown: bool | None, **options: Any) -> tqdm:
    """Return a tqdm bar, which is silent where TQDM_DISABLE is set, as `--quiet` does.

    Args:
        shown: Whether to show the bar; None shows it only on a terminal.
        **options: Other options of tqdm.
    """
    if os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        shown = False  # in tqdm itself, the argument overrides the variable
    return tqdm(disable=None if shown is None else not shown, **options)
