"""Serve a page that embeds and annotates the cells of an uploaded .h5ad file; see README.md."""

import os
import tempfile

if __name__ == "__main__":  # the processes that do the work import this file, too
    # Gradio reads these when it is imported. What users upload lies in a folder of this process alone.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="tahoex1-space-", dir=os.environ.get("GRADIO_TEMP_DIR"))

    from tahoex1_space.interface import serve

    serve(os.environ["GRADIO_TEMP_DIR"])
