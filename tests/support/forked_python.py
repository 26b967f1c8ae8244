"""Stand for Python where a launcher starts processes: run its arguments as a fork of the fork server.

It imports only a little of the standard library, since this is the whole cost of a start.
"""

import contextlib
import os
import signal
import sys
from typing import Any

from forked import ask


def main() -> None:
    """Start the command, hand signals on to it, and end as it ends."""
    path, arguments, environment, unchecked = os.environ["FORK_SERVER"], sys.argv[1:], dict(os.environ), []
    if arguments[0] == "--worker":  # a process of pytest-xdist, which replaces `sys.path`
        del arguments[0], environment["FORK_SERVER"]
        unchecked = ["PYTHONPATH"]
    answer, number = ask(path, arguments, environment, os.getcwd(), [1, 2, 0], unchecked)

    def hand_on(received: int, _: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, received)

    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(each, hand_on)
    status = int(answer.recv(64))
    if status < 0:  # a signal ended the command
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()
