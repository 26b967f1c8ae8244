"""What a Space does for its users, without a web page: takes files, lets work wait in line, and keeps nothing."""

import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Literal

from tahoex1_space.jobs import JobError, run_job
from tahoex1_space.limits import VARIABLE, Extent, Limits, check_file, check_time
from tahoex1_space.work import analyse, prepare_reference

HERE = Path(__file__).resolve().parents[1]  # app.py's folder
SECONDS_BESIDES = 60.0  # of loading, annotating and drawing, so that an estimate is rather too long
KEPT_SECONDS = 1800  # after which a result, and a file that nothing was done with, is removed
_SECONDS_TO_LOOK = 0.3
Role = Literal["query", "reference"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The model and the reference of a Space.

    Attributes:
        model: Folder or Hub name.
        size: Size to take from a model that holds several.
        reference: `.h5ad` file with labelled cells.
        label: Column of its obs with the labels.
        example: `.h5ad` file to try the Space with.
    """

    model: str = "tahoebio/Tahoe-x1"
    size: str | None = "70m"
    reference: Path = HERE / "reference.h5ad"
    label: str = "cell_type"
    example: Path = HERE / "example.h5ad"

    @classmethod
    def from_environment(cls, environment: Any = os.environ) -> "Settings":
        """Return the settings that the environment sets; a model that is named needs a size if it has several."""
        model = environment.get(f"{VARIABLE}MODEL")
        size = environment.get(f"{VARIABLE}SIZE") or (None if model else cls.size)
        return cls(
            model or cls.model,
            size,
            Path(environment.get(f"{VARIABLE}REFERENCE") or cls.reference),
            environment.get(f"{VARIABLE}LABEL") or cls.label,
            Path(environment.get(f"{VARIABLE}EXAMPLE") or cls.example),
        )


class Line:
    """Work that waits for its turn, first come, first served.

    Args:
        limits: How much is done at once, and how much may wait.
    """

    def __init__(self, limits: Limits):
        self._limits, self._lock = limits, threading.Lock()
        self._tickets: list[object] = []

    def join(self) -> object:
        """Return a ticket at the end of the line.

        Raises:
            ValueError: If too many wait.
        """
        with self._lock:
            if len(self._tickets) >= self._limits.jobs + self._limits.waiting:
                raise ValueError(
                    f"{self._limits.waiting} pieces of work are waiting already, which is the most here: try again "
                    "in some minutes."
                )
            ticket = object()
            self._tickets.append(ticket)
            return ticket

    def ahead(self, ticket: object) -> int:
        """Return how many pieces of work must end before this one begins; 0 if it may."""
        with self._lock:
            return max(0, self._tickets.index(ticket) - self._limits.jobs + 1)

    def leave(self, ticket: object) -> None:
        """Make room for others."""
        with self._lock:
            self._tickets.remove(ticket)


class Space:
    """A Space: its limits, its reference with embeddings, and the files of those who use it now.

    Args:
        settings: Model and reference.
        limits: Limits.
        root: Folder for files, which is emptied of what users leave.
        context: Way in which processes are started.

    Raises:
        ValueError: If the reference or the model cannot be used; the message says what to do.
    """

    def __init__(self, settings: Settings, limits: Limits, root: Path, context: BaseContext):
        self.settings, self.limits, self.root, self.context = settings, limits, root, context
        self.line = Line(limits)
        self._stopped: set[str] = set()
        self._running: set[str] = set()
        if not settings.reference.is_file():
            raise ValueError(
                f"There is no {settings.reference}: `make space` makes one, or name another by {VARIABLE}REFERENCE."
            )
        self.reference = root / "space" / "reference.h5ad"
        self.reference.parent.mkdir(parents=True)
        made = self._prepare()
        self.context_length = int(made["context_length"])
        extent = check_file(settings.reference, limits, self.context_length)
        self.tokens_per_second = extent.tokens / max(float(made["seconds"]), 1e-3)
        logger.info("The model takes %.0f tokens a second here.", self.tokens_per_second)

    def _prepare(self) -> dict[str, Any]:
        paths = {"reference": str(self.settings.reference), "output": str(self.reference)}
        model = {"model": self.settings.model, "size": self.settings.size}
        try:
            for news in run_job(self.context, prepare_reference, {**paths, **model}, 60.0 * self.limits.minutes):
                if isinstance(news, dict):
                    return news
        except JobError as error:
            raise ValueError(str(error)) from error
        raise AssertionError("a job ends with a result or an error")

    def accept(self, session: str, role: Role, upload: str | Path) -> tuple[Extent, float]:
        """Take an uploaded file after a look at its sizes.

        Args:
            session: Name of the session that uploads it.
            role: Whether it is the cells or a reference.
            upload: Path of the file, which is gone afterwards, whatever comes of it.

        Returns:
            Sizes of the file, and an estimate of the seconds that its work takes.

        Raises:
            ValueError: If the file is beyond a limit or cannot be used; the message says what to do.
        """
        return self._take(session, role, Path(upload), os.replace)

    def accept_example(self, session: str) -> tuple[Extent, float]:
        """Take the Space's example as the session's cells; see `accept`."""
        return self._take(session, "query", self.settings.example, shutil.copyfile)

    def _take(self, session: str, role: Role, file: Path, put: Callable[[Path, Path], object]) -> tuple[Extent, float]:
        self.discard(session, role)
        self._remove_old()
        target = self._folder(session) / role / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            put(file, target)
        except FileNotFoundError:  # another session uploaded the very same file in the same moment
            raise ValueError("The upload is no longer here: choose the file again.") from None
        try:
            extent = check_file(target, self.limits, self.context_length)
            return extent, check_time(extent, self.limits, self.tokens_per_second, SECONDS_BESIDES)
        except ValueError:
            self.discard(session, role)
            raise

    def discard(self, session: str, role: Role) -> None:
        """Remove a session's file."""
        shutil.rmtree(self._folder(session) / role, ignore_errors=True)

    def analyse(self, session: str, label: str) -> Iterator[int | tuple[str, int, int] | dict[str, Any] | None]:
        """Wait in line, embed and annotate a session's cells, and remove its uploads.

        Args:
            session: Name of the session.
            label: Column of obs of the user's reference; ignored where the Space's is taken.

        Yields:
            The number of pieces of work ahead; then title, done and total of each step, None where there is no news;
            and at the end the result of `work.analyse`.

        Raises:
            ValueError: If nothing can come of it; the message is meant for the user.
        """
        folder = self._folder(session)
        query, reference = (self._file(session, role) for role in ("query", "reference"))
        if query is None:
            raise ValueError("There are no cells to work on: choose an .h5ad file first.")
        if reference is not None and not label.strip():
            raise ValueError("Name the column of the reference's obs that holds the labels, such as cell_type.")
        if folder.name in self._running:
            raise ValueError("Your last piece of work has not ended: wait for it, or stop it.")
        ticket = self.line.join()
        self._running.add(folder.name)
        self._stopped.discard(folder.name)
        try:
            yield from self._wait(ticket, folder.name)
            for each in ("work", "result"):
                shutil.rmtree(folder / each, ignore_errors=True)
            arguments = {
                "folder": str(folder),
                "query": str(query),
                "reference": str(reference or self.reference),
                "label": label.strip() if reference is not None else self.settings.label,
                "own_reference": reference is not None,
                "model": self.settings.model,
                "size": self.settings.size,
            }
            for news in run_job(self.context, analyse, arguments, 60.0 * self.limits.minutes):
                self._check_wanted(folder.name)
                if isinstance(news, dict):
                    news["notes"] = [without_folders(note, folder) for note in news["notes"]]
                yield news
        except JobError as error:
            raise ValueError(without_folders(str(error), folder)) from error
        finally:
            self.line.leave(ticket)
            self._running.discard(folder.name)
            for each in ("query", "reference", "work"):
                shutil.rmtree(folder / each, ignore_errors=True)

    def _wait(self, ticket: object, name: str) -> Iterator[int]:
        while ahead := self.line.ahead(ticket):
            yield ahead
            self._check_wanted(name)
            time.sleep(_SECONDS_TO_LOOK)

    def _check_wanted(self, name: str) -> None:
        if name in self._stopped:
            raise ValueError("The work was stopped, and your files are removed.")

    def stop(self, session: str) -> None:
        """End a session's work at its next step."""
        name = self._folder(session).name
        if name in self._running:
            self._stopped.add(name)

    def forget(self, session: str) -> None:
        """End a session's work, and remove everything that is of it."""
        self.stop(session)
        shutil.rmtree(self._folder(session), ignore_errors=True)

    def _remove_old(self) -> None:
        for folder in (self.root / "sessions").glob("*"):
            if folder.name not in self._running and time.time() - folder.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)

    def _file(self, session: str, role: str) -> Path | None:
        return next(iter((self._folder(session) / role).glob("*")), None)

    def _folder(self, session: str) -> Path:
        """Return the folder of a session, whose name is chosen by its browser."""
        return self.root / "sessions" / hashlib.sha256(session.encode()).hexdigest()


def without_folders(text: str, folder: Path) -> str:
    """Take the places of a session's files out of a message, so that the names are left that its user knows."""
    for each in ("query/", "reference/", "work/report/", "work/", "result/", ""):
        text = text.replace(f"{folder}/{each}", "")
    return text
