"""The page of a Space, and the server that shows it."""

import atexit
import logging
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from tahoex1_space import page
from tahoex1_space.limits import Limits
from tahoex1_space.service import HERE, KEPT_SECONDS, Role, Settings, Space

CSS = """
#status progress { width: 100%; height: 1.2em; appearance: none; border: 1px solid #595959; }
#status progress::-webkit-progress-bar { background: #ffffff; }
#status progress::-webkit-progress-value { background: #0072b2; }
#status progress::-moz-progress-bar { background: #0072b2; }
#problem p, #too-large:not(:empty) { border-left: 0.3em solid #b3261e; padding: 0.3em 0.8em; }
#result table { border-collapse: collapse; }
#result caption { text-align: left; padding: 0.4em 0; }
#result th, #result td { padding: 0.25em 0.8em; text-align: right; border: 1px solid #8888; font: inherit; }
#result th:first-child { text-align: left; }
#result thead th { font-weight: bold; }
footer, footer *, .or { color: inherit !important; }
:focus-visible { outline: 3px solid #0072b2 !important; outline-offset: 2px; }
"""
# White on Gradio's orange has a contrast of less than 3; on this blue it is 6.7.
THEME = gr.themes.Default(primary_hue="blue").set(
    button_primary_background_fill="#1d4ed8",
    button_primary_background_fill_dark="#1d4ed8",
    button_primary_background_fill_hover="#1e40af",
    button_primary_background_fill_hover_dark="#1e40af",
)
# Screen readers read out what changes in these regions, without the focus leaving the button.
LIVE = "element.setAttribute('role', '{role}'); element.setAttribute('aria-live', '{how}');"

# A file that is too large is refused before it is sent; what Gradio shows then is gone after some seconds.
REFUSE = """() => {
  const refuse = (event, files) => {
    const told = document.getElementById('too-large');
    const large = [...(files || [])].find((file) => file.size > MEGABYTES * 1e6);
    told.textContent = large ? `${large.name} has ${Math.ceil(large.size / 1e6)} MB, and MEGABYTES are allowed ` +
      'here: upload fewer cells, without layers that the model does not need.' : '';
    if (large) { event.stopImmediatePropagation(); event.preventDefault(); }
  };
  document.addEventListener('change', (event) => {
    if (event.target.type === 'file') {
      refuse(event, event.target.files);
      if (event.cancelBubble) event.target.value = '';
    }
  }, true);
  document.addEventListener('drop', (event) => refuse(event, event.dataTransfer && event.dataTransfer.files), true);
}"""


def taken(space: Space, role: Role, upload: str | None, request: gr.Request) -> tuple[str, str]:
    """Look at an upload at once; return the texts of status and problem."""
    session = str(request.session_hash)
    if upload is None:
        space.discard(session, role)
        return "", ""
    try:
        return page.accepted(Path(upload).name, *space.accept(session, role, upload)), ""
    except ValueError as error:
        return "", page.problem(str(error))


def taken_example(space: Space, request: gr.Request) -> tuple[None, str, str]:
    """Take the Space's example; return the values of upload, status and problem."""
    extent, seconds = space.accept_example(str(request.session_hash))
    return None, page.accepted(space.settings.example.name, extent, seconds), ""


def worked(space: Space, label: str, request: gr.Request) -> Iterator[tuple[Any, ...]]:
    """Do the work; yield the values of upload, reference, status, problem, result, and both downloads."""
    kept, gone = gr.skip(), gr.DownloadButton(visible=False)
    try:
        yield kept, kept, page.progress("Starting", 0, 0), "", "", gone, gone
        for news in space.analyse(str(request.session_hash), label):
            if isinstance(news, dict):
                report = gr.DownloadButton(value=news["report"], visible=True) if news["report"] else gone
                cells = gr.DownloadButton(value=news["cells"], visible=True)
                yield None, None, "<p>Done. The result is below.</p>", "", page.result(news), cells, report
            elif news is not None:
                text = page.waiting(news) if isinstance(news, int) else page.progress(*news)
                yield kept, kept, text, kept, kept, kept, kept
    except ValueError as error:
        yield None, None, "", page.problem(str(error)), "", gone, gone


def build(space: Space) -> gr.Blocks:
    """Return the page."""
    with gr.Blocks(title="Tahoe-x1: embed and annotate cells", delete_cache=(60, KEPT_SECONDS)) as blocks:
        model = " ".join(filter(None, [Path(space.settings.model).name, space.settings.size]))
        gr.Markdown(page.introduction(model, space.limits, space.settings.label))
        upload = gr.File(label="Your cells (.h5ad)", file_types=[".h5ad"], elem_id="upload")
        with gr.Accordion("A reference of your own", open=False):
            gr.Markdown(
                "By default the Space's own reference is taken. Yours needs raw counts and a column of labels."
            )
            reference = gr.File(label="Labelled cells (.h5ad)", file_types=[".h5ad"], elem_id="reference")
            label = gr.Textbox(label="Column of obs with the labels", placeholder="cell_type", max_length=200)
        with gr.Row():
            start = gr.Button("Embed and annotate", variant="primary", elem_id="start")
            example = gr.Button(
                "Take the example instead", elem_id="example", visible=space.settings.example.is_file()
            )
            stop = gr.Button("Stop", elem_id="stop")
        status = gr.HTML(elem_id="status", js_on_load=LIVE.format(role="status", how="polite"))
        gr.HTML("<div id='too-large' role='alert'></div>")
        problem = gr.HTML(elem_id="problem", js_on_load=LIVE.format(role="alert", how="assertive"))
        shown = gr.HTML(elem_id="result")
        with gr.Row():
            cells = gr.DownloadButton("Download the cells (.h5ad)", visible=False, elem_id="cells")
            report = gr.DownloadButton("Download the report (.zip)", visible=False, elem_id="report")

        options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

        def take(role: Role) -> Any:
            def took(file: str | None, request: gr.Request) -> tuple[str, str]:
                return taken(space, role, file, request)

            return took

        def take_example(request: gr.Request) -> tuple[None, str, str]:
            return taken_example(space, request)

        def work(name: str, request: gr.Request) -> Iterator[tuple[Any, ...]]:
            yield from worked(space, name, request)

        def halt(request: gr.Request) -> None:
            space.stop(str(request.session_hash))

        def leave(request: gr.Request) -> None:
            space.forget(str(request.session_hash))

        for file, role in ((upload, "query"), (reference, "reference")):
            for event in (file.upload, file.clear):
                event(take(role), file, [status, problem], queue=False, **options)
        example.click(take_example, None, [upload, status, problem], queue=False, **options)
        outputs = [upload, reference, status, problem, shown, cells, report]
        limit = space.limits.jobs + space.limits.waiting + 1  # the line is ours, so that it can be told of
        start.click(work, label, outputs, concurrency_limit=limit, **options)
        stop.click(halt, None, None, queue=False, **options)
        blocks.unload(leave)
        blocks.load(None, None, None, js=REFUSE.replace("MEGABYTES", str(space.limits.megabytes)))
    return blocks


def serve(root: str) -> None:
    """Prepare the reference, and serve the page until the process is ended.

    Args:
        root: Folder for what users upload and get, removed at the end.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for library in ("httpx", "tahoex1_hf"):  # which tell of every request, and of files by name
        logging.getLogger(library).setLevel(logging.WARNING)
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    # The process that forks the others imports torch once, not for each piece of work; Python 3.11 hands no path on.
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    context.set_forkserver_preload(["tahoex1_space.work"])
    limits = Limits.from_environment()
    try:
        space = Space(Settings.from_environment(), limits, Path(root), context)
    except ValueError as error:
        sys.exit(f"Error: {error}")
    build(space).queue(max_size=2 * (limits.jobs + limits.waiting)).launch(
        server_name=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),  # a Space sets 0.0.0.0
        max_file_size=limits.megabytes * 10**6,
        max_threads=limits.jobs + limits.waiting + 20,
        theme=THEME,
        css=CSS,
        footer_links=["gradio"],
        ssr_mode=False,
        share=False,
    )
