"""A command of tahoex1 with a clock: `python -m benchmarks.gpu_clock BEGAN FILE COMMAND …`.

It imports nothing that the command would not import, when the command would.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tahoex1_hf.common.imports import call_after_import


def main(began: str, file: str, *arguments: str) -> None:
    """Run a command, and write when it had its model, its first and its last batch.

    Args:
        began: Time at which it was called, in seconds since 1970.
        file: JSON file for the seconds since then.
        arguments: The command, as after `tahoex1`.
    """
    times: dict[str, float] = {"python_s": time.time() - float(began)}

    def watch() -> None:
        from tahoex1_hf.inference.encoder import CellEncoder

        begin: Any = CellEncoder.begin

        def timed(self: CellEncoder, cells: Any, means: Any, on_batch: Callable[[int], object], *rest: Any) -> Any:
            times.setdefault("loaded_s", time.time() - float(began))

            def noting(number: int) -> None:
                now = time.time() - float(began)
                times["last_batch_s"] = now
                if "first_batch_s" not in times:
                    times.update(first_batch_s=now, first_cells=number)
                on_batch(number)

            return begin(self, cells, means, noting, *rest)

        CellEncoder.begin = timed  # type: ignore[method-assign, assignment]

    call_after_import("tahoex1_hf.inference.encoder", watch)
    from tahoex1_hf.cli.app import app

    sys.argv = ["tahoex1", *arguments]
    try:
        app()
    finally:
        Path(file).write_text(json.dumps(times))


if __name__ == "__main__":
    main(*sys.argv[1:])
