"""The page of a Space in a real Chromium: upload, wait, result, bad and large files, two users, keyboard, readers.

`make test-space` makes the environment that these tests need. With TAHOEX1_SPACE_PICTURES=FOLDER the page is drawn.
"""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import anndata as ad
import numpy as np
import pytest
from helpers import REPO_ROOT

CHROMIUM = shutil.which("chromium")
MISSING = [
    name for name in ("gradio", "playwright", "axe_playwright_python") if importlib.util.find_spec(name) is None
]
pytestmark = pytest.mark.skipif(
    bool(MISSING) or CHROMIUM is None,
    reason=f"needs {', '.join([*MISSING, *([] if CHROMIUM else ['chromium'])])}: run make test-space",
)

EXAMPLES = REPO_ROOT / "examples"
PICTURES = os.environ.get("TAHOEX1_SPACE_PICTURES")
# Without these, Chromium asks the network for what it does not get on a closed machine.
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
LONG = 540_000  # milliseconds; a busy machine may need minutes for what takes seconds
MOST_CELLS = 520


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the Space's cells, and cells that it does not take."""
    folder = tmp_path_factory.mktemp("files")
    sys.path.insert(0, str(EXAMPLES))
    from space_cells import space_cells

    reference, example = space_cells()
    reference.write_h5ad(folder / "reference.h5ad", compression="gzip")
    example.write_h5ad(folder / "example.h5ad", compression="gzip")
    example[:60].write_h5ad(folder / "mine.h5ad", compression="gzip")
    example[60:120].write_h5ad(folder / "theirs.h5ad", compression="gzip")
    (folder / "bad.h5ad").write_text("I am no cells.")
    many = ad.concat([reference, example])
    many.obs = many.obs[[]]
    many.write_h5ad(folder / "many.h5ad", compression="gzip")
    (folder / "large.h5ad").write_bytes(np.random.default_rng(0).bytes(3_000_000))
    return folder


@pytest.fixture(scope="module")
def server(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Return the address of a Space on the loopback interface, and the folder of its users' files."""
    root, port = tmp_path_factory.mktemp("root"), free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPO_ROOT),
        "GRADIO_TEMP_DIR": str(root),
        "GRADIO_SERVER_PORT": str(port),
        "TAHOEX1_SPACE_MODEL": str(EXAMPLES / "demo_checkpoint"),
        "TAHOEX1_SPACE_REFERENCE": str(files / "reference.h5ad"),
        "TAHOEX1_SPACE_EXAMPLE": str(files / "example.h5ad"),
        "TAHOEX1_SPACE_CELLS": str(MOST_CELLS),
        "TAHOEX1_SPACE_MEGABYTES": "2",
    }
    environment.pop("GRADIO_SERVER_NAME", None)
    log = files / "server.log"
    with log.open("w") as output:
        command = [sys.executable, "-W", "ignore", "app.py"]
        process = subprocess.Popen(command, cwd=EXAMPLES / "space", env=environment, stdout=output, stderr=output)
        address = f"http://127.0.0.1:{port}"
        try:
            while not answers(address):
                assert process.poll() is None, log.read_text()
                time.sleep(0.5)
            yield address, root
        finally:
            process.terminate()
            process.wait(120)
    assert not list(root.iterdir()), "the server leaves nothing behind"
    assert not re.search("Traceback|mine|theirs|many", log.read_text()), "the log tells of no error and no file"


def answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, server: tuple[str, Path]) -> Iterator[Any]:
    with_user = user(browser, server)
    yield with_user
    with_user.context.close()


def user(browser: Any, server: tuple[str, Path]) -> Any:
    """Return a page of a new user, which may ask no other machine for anything."""
    page = browser.new_context(viewport={"width": 1100, "height": 1000}).new_page()
    page.set_default_timeout(LONG)
    outside: list[str] = []
    page.on(
        "request",
        lambda asked: None if asked.url.startswith((server[0], "data:", "blob:")) else outside.append(asked.url),
    )
    page.goto(server[0])
    page.wait_for_selector("#status [role=status]", state="attached")
    page.wait_for_load_state("load")  # the network is never idle: Gradio's heartbeat stays open
    assert not outside
    return page


def choose(page: Any, path: Path, where: str = "#upload") -> None:
    page.set_input_files(f"{where} input[type=file]", path)


def says(page: Any, place: str, text: str) -> str:
    """Wait until a region holds a text; return all of it."""
    found = page.locator(f"{place} .prose").filter(has_text=text)
    found.wait_for()
    return str(found.inner_text())


def draw(page: Any, name: str) -> None:
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(PICTURES) / f"{name}.png", full_page=True)


def faults(page: Any) -> list[str]:
    """Return what axe finds that keeps people from using the page."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {[node['html'][:120] for node in each['nodes']]}" for each in found]


def kept(root: Path) -> set[str]:
    return {
        path.name
        for path in root.rglob("*")
        if path.is_file() and path.stat().st_size and "space" not in path.parts[-2]
    }


def test_cells_are_uploaded_and_results_come_back(page: Any, files: Path, server: tuple[str, Path]) -> None:
    draw(page, "start")
    choose(page, files / "mine.h5ad")
    assert "60 cells × 744 genes, taken" in says(page, "#status", "mine.h5ad")
    draw(page, "taken")
    page.click("#start")
    says(page, "#status", "Embedding")
    draw(page, "embedding")
    says(page, "#status", "Done. The result is below.")
    draw(page, "result")
    assert page.get_attribute("#result img", "alt").startswith("UMAP of the embeddings of 60 cells, coloured by label")
    numbers = [int(text) for text in page.locator("#result tbody td:nth-child(2)").all_inner_texts()]
    assert sum(numbers) == 60
    with page.expect_download() as download:
        page.click("#cells")
    assert download.value.suggested_filename == "mine_tahoe_x1.h5ad"
    cells = ad.read_h5ad(download.value.path())
    assert cells.obsm["X_tahoe_x1"].shape == (60, 64)
    assert cells.obs["tahoex1_cell_type"].value_counts().max() == max(numbers)
    with page.expect_download() as download:
        page.click("#report")
    assert download.value.suggested_filename == "mine_report.zip"
    assert kept(server[1]) == {"mine_tahoe_x1.h5ad", "mine_report.zip"}
    assert not faults(page)
    page.close()
    while kept(server[1]):
        time.sleep(0.5)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("bad.h5ad", "bad.h5ad is not an .h5ad file, which is what AnnData and scanpy write"),
        ("many.h5ad", f"many.h5ad has 700 cells, and {MOST_CELLS} are allowed here"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_a_sentence(
    name: str, sentence: str, page: Any, files: Path, server: tuple[str, Path]
) -> None:
    choose(page, files / name)
    assert sentence in says(page, "#problem", "This did not work.")
    draw(page, Path(name).stem)
    assert page.get_attribute("#problem .prose", "role") == "alert"
    assert not faults(page)
    assert not kept(server[1])
    page.click("#start")
    says(page, "#problem", "There are no cells to work on: choose an .h5ad file first.")


def test_a_file_that_is_too_large_is_not_even_uploaded(page: Any, files: Path, server: tuple[str, Path]) -> None:
    choose(page, files / "large.h5ad")
    told = page.locator("#too-large")
    told.filter(has_text="large.h5ad has 3 MB, and 2 are allowed here: upload fewer cells").wait_for()
    assert told.get_attribute("role") == "alert"
    draw(page, "large")
    assert not faults(page)
    assert not kept(server[1])
    choose(page, files / "mine.h5ad")
    says(page, "#status", "mine.h5ad")
    assert told.inner_text() == ""


def test_the_server_itself_refuses_a_file_that_is_too_large(files: Path, server: tuple[str, Path]) -> None:
    """What the page does can be left out by whoever writes to the server."""
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="large.h5ad"\r\n\r\n'
    body += (files / "large.h5ad").read_bytes() + b"\r\n--x--\r\n"
    asked = Request(f"{server[0]}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"})
    with pytest.raises(HTTPError, match="413"):
        urlopen(asked, timeout=300)
    assert not kept(server[1])


def test_two_users_at_once_get_their_own_results(browser: Any, files: Path, server: tuple[str, Path]) -> None:
    first, second = user(browser, server), user(browser, server)
    for page, name in ((first, "mine"), (second, "theirs")):
        choose(page, files / f"{name}.h5ad")
        says(page, "#status", "taken")
    first.click("#start")
    says(first, "#status", "Embedding")
    second.click("#start")
    says(second, "#status", "Waiting: 1 piece of work of others is before yours.")
    draw(second, "waiting")
    got = []
    for page in (first, second):
        says(page, "#status", "Done.")
        with page.expect_download() as download:
            page.click("#cells")
        got.append(ad.read_h5ad(download.value.path()))
    for cells, name in zip(got, ("mine", "theirs"), strict=True):
        assert list(cells.obs_names) == list(ad.read_h5ad(files / f"{name}.h5ad").obs_names)
    first.context.close()
    second.context.close()


def test_the_keyboard_alone_is_enough(page: Any) -> None:
    """Every control can be reached by Tab, in the order in which it is read, and work be begun and stopped."""
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("(document.activeElement.closest('[id]') || {id: ''}).id"))
    controls = [name for name in seen if name in {"upload", "start", "example", "stop"}]
    assert list(dict.fromkeys(controls)) == ["upload", "start", "example", "stop"], seen
    page.focus("#example")
    page.keyboard.press("Enter")
    says(page, "#status", "example.h5ad: 200 cells")
    page.focus("#start")
    page.keyboard.press("Space")
    says(page, "#status", "Embedding")
    page.focus("#stop")
    page.keyboard.press("Enter")
    says(page, "#problem", "The work was stopped, and your files are removed.")
