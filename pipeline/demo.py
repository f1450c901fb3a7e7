"""A page on this machine: an image, any names, and what the student finds. It asks nothing of any network.

    python cli.py demo runs/demo

The only door to gradio, the extra `demo`. The student is loaded once, the teacher's text encoder when a name first
needs it.
"""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.config import UserError
from pipeline.data.base import read_image
from pipeline.learning.segmenter import NONE, Asked, Segmenter, check, parsed_names
from pipeline.looking.overlay import Share, painted, shares
from pipeline.tracking import say

KEEP_S = 3600  # uploads are removed when they are this old
MOST_UPLOADED = "100mb"
GAMMAS = (0.0, 5.0)  # what the slider offers: the range of the evaluation's sweep
FONTS = ["system-ui", "sans-serif"]  # of the machine that looks on: none is fetched
# Colours come from gradio's own variables, so that light and dark mode both fit.
STYLE = """
.found { border-collapse: collapse; width: 100%; }
.found tr, .found th, .found td { text-align: left; padding: 0.3em 0.6em; border: 0 !important; }
.found tr { border-bottom: 1px solid var(--border-color-primary) !important; }
.found td.share { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.swatch { display: inline-block; width: 1em; height: 1em; vertical-align: -0.15em; border: 1px solid #888; }
.hatched { background: repeating-linear-gradient(135deg, #b0b4bc 0 2px, #f4f4f6 2px 6px); }
.wrong { padding: 0.6em 0.8em; border-left: 4px solid #d55e00; background: var(--background-fill-secondary); }
"""


def serve(run: Path, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serves the page until it is interrupted.

    Raises: CheckpointError; UserError where gradio is missing or the address can't be had.
    """
    segmenter = Segmenter(run)
    page = build(segmenter)
    try:
        _, address, _ = page.launch(**options(), server_name=host, server_port=port)
    except OSError:  # gradio's words name options of its own
        raise UserError(
            f"--host {host} --port {port}: nobody can listen there; the port is taken, or the host isn't this machine. "
            "Choose another."
        ) from None
    say(f"demo: {segmenter.file} at {address} (Ctrl-C ends it)")
    page.block_thread()


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = (
        "False"  # read when the package is imported, and nothing else stops it all
    )
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"demo needs the package {error.name}: pip install -e '.[demo]'.") from None
    return gradio


def options() -> dict[str, Any]:
    """How the page is launched, address aside: without any part that would reach into a network."""
    gradio = _gradio()
    return {
        "prevent_thread_lock": True,
        "quiet": True,
        "share": False,
        "ssr_mode": False,
        "enable_monitoring": False,
        "footer_links": [],
        "max_file_size": MOST_UPLOADED,
        "theme": gradio.themes.Base(font=FONTS, font_mono=["ui-monospace", "monospace"]),
        "css": STYLE,
    }


def build(segmenter: Segmenter) -> Any:
    """The page as gradio's Blocks, not launched; its one function has the API name /segment."""
    gradio = _gradio()
    checkpoint, gamma = segmenter.checkpoint, segmenter.config.eval.gamma
    title = f"Any image, any names: {segmenter.config.name}"
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(KEEP_S, KEEP_S)) as page:
        gradio.Markdown(f"# {title}\n{_about(segmenter)}")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(
                    label="Image",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=360,
                )
                # gradio's own step opens the file, which ends in a traceback where it can't; `found` says it in a line.
                image.preprocess = lambda upload: None if upload is None else upload.path
                names = gradio.Textbox(
                    ", ".join(checkpoint.classes),
                    label="Names, separated by commas; synonyms of one by |",
                    lines=2,
                    max_lines=6,
                )
                added = gradio.Slider(
                    *GAMMAS, value=gamma, step=0.1, label="gamma: added to names never labelled in training"
                )
                least = gradio.Slider(
                    0,
                    1,
                    value=0,
                    step=0.01,
                    label="none of these: where the best score is below (0: nowhere)",
                )
                button = gradio.Button("Segment", variant="primary")
            with gradio.Column():
                picture = gradio.Image(
                    label="Found",
                    type="pil",
                    format="png",
                    interactive=False,
                    height=360,
                    buttons=["download"],
                )
                table = gradio.HTML()

        def segment(
            path: str | None, text: str, gamma: float, reject: float
        ) -> tuple[Image.Image | None, str]:
            return found(segmenter, path, text, gamma, reject)

        inputs, outputs = [image, names, added, least], [picture, table]
        button.click(segment, inputs, outputs, api_name="segment")
        for changed in (names.submit, added.release, least.release, image.upload):
            changed(segment, inputs, outputs, api_visibility="private")
    return page


def _about(segmenter: Segmenter) -> str:
    checkpoint = segmenter.checkpoint
    if segmenter.is_closed:
        return f"This student has learned its {len(checkpoint.classes)} classes and knows no other name."
    labelled = len(checkpoint.seen_ids)
    return f"Trained with labels of {labelled} classes; every other name is read by the teacher's text encoder alone."


def found(
    segmenter: Segmenter, path: str | None, text: str, gamma: float, reject: float
) -> tuple[Image.Image | None, str]:
    """The painted picture and its legend as HTML; of a user's mistake no picture, and the line that says it."""
    try:
        if path is None:
            raise UserError("Choose an image first.")
        check(reject, None)
        asked = segmenter.ask(parsed_names(text, segmenter.checkpoint.classes))
        image = read_image(path)
        (scores,) = segmenter.scores([image], asked, gamma)
        ids = segmenter.decide(scores, (image.shape[0], image.shape[1]), reject or None)
    except UserError as error:
        line = str(error).replace(str(path), Path(path).name) if path else str(error)
        return None, f'<p class="wrong" role="alert">{html.escape(line.removeprefix("--names "))}</p>'
    return painted(image, ids, len(asked.names)), _table(shares(ids, asked.titles), asked)


def _table(found: list[Share], asked: Asked) -> str:
    """A row for every name that was found: its colour, itself, its part of the image, and whether it had labels."""
    rows = []
    for share in found:
        swatch = (
            '<span class="swatch hatched"></span>'
            if share.id == NONE
            else f'<span class="swatch" style="background: rgb{share.colour}"></span>'
        )
        trained = "" if share.id == NONE else "yes" if asked.is_trained[share.id] else "no"
        rows.append(
            f'<tr><td>{swatch} {html.escape(share.title)}</td><td class="share">{share.percent}</td>'
            f"<td>{trained}</td></tr>"
        )
    head = "<tr><th>name</th><th>part of the image</th><th>labelled in training</th></tr>"
    return f'<table class="found"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'
