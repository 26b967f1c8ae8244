"""Run work on a user's file in a process of its own, which is ended when it takes too long or is not wanted."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

logger = logging.getLogger(__name__)

# Function that is told the title of a step, how much of it is done, and of how much.
Tell = Callable[[str, int, int], None]
_SECONDS_BETWEEN = 0.25  # progress that is told more often would only be drawn more often
_SECONDS_TO_LOOK = 0.2


class JobError(Exception):
    """An error whose text is meant for the user."""


def run_job(
    context: BaseContext, work: Callable[..., dict[str, Any]], arguments: dict[str, Any], seconds: float
) -> Iterator[tuple[str, int, int] | dict[str, Any] | None]:
    """Run a function in a process, and yield its progress and at the end its result.

    The process is killed when the iterator is closed. What it sends is JSON: nothing that came of a file is unpickled.

    Args:
        context: Way in which processes are started.
        work: Function of a module, called with a `Tell` and the arguments.
        arguments: Arguments by name.
        seconds: Longest time.

    Yields:
        Title, done and total of a step; None a few times a second where there is no news; the result at the end.

    Raises:
        JobError: If the work fails, takes too long, or its process dies.
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, work, arguments), daemon=True)  # type: ignore[attr-defined]
    process.start()
    sender.close()
    end = time.monotonic() + seconds
    try:
        while True:
            if time.monotonic() > end:
                raise JobError(
                    f"The work was ended after {seconds / 60:.0f} minutes, which is the longest time here: upload "
                    "fewer cells."
                )
            if not receiver.poll(_SECONDS_TO_LOOK):
                yield None
                continue
            try:
                kind, value = json.loads(receiver.recv_bytes())
            except EOFError:
                raise JobError(
                    "The work ended without a result, most often because memory ran out: upload fewer cells."
                ) from None
            if kind == "error":
                raise JobError(value)
            yield tuple(value) if kind == "progress" else value
            if kind == "result":
                return
    finally:
        process.kill()
        process.join()
        receiver.close()


def _serve(sender: Connection, work: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> None:
    told = [0.0, ""]

    def tell(title: str, done: int, total: int) -> None:
        now = time.monotonic()
        if title != told[1] or now - told[0] > _SECONDS_BETWEEN or done == total:
            told[:] = now, title
            sender.send_bytes(json.dumps(("progress", (title, done, total))).encode())

    try:
        answer: tuple[str, Any] = ("result", work(tell, **arguments))
    except (ValueError, OSError, ImportError) as error:  # the package's errors are sentences
        logger.info("Refused: %s", error)
        answer = ("error", str(error))
    except MemoryError:
        answer = ("error", "The work needs more memory than there is here: upload fewer cells.")
    except Exception:
        logger.exception("The work failed.")
        answer = ("error", "Something failed here that no message foresees. The Space's log says what.")
    sender.send_bytes(json.dumps(answer).encode())
    sender.close()
