"""A page on this machine: an image, any names, and what the student finds. It asks nothing of any network.

    python cli.py demo runs/demo

The only door to gradio (requirements-page.txt). The student is loaded once, the teacher's text encoder when a name
first needs it. What visitors may ask for stands in looking/visitors.py.
"""

from __future__ import annotations

import contextlib
import html
import math
import os
import secrets
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.config import UserError
from pipeline.data.base import MAX_PIXELS, DataError, read_image
from pipeline.learning.segmenter import Asked, Name, Segmenter, check, parsed_names
from pipeline.looking.overlay import Share, painted, shares
from pipeline.looking.visitors import ANY, Door, is_loopback, is_own, listening, uploads
from pipeline.ops.labels import IGNORE
from pipeline.running.console import say

KEEP_S = 3600  # uploads are removed when they are this old
MOST_UPLOADED = "100mb"
MOST_TEXT = 10_000  # characters of all names
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
    server, listens, address = prepared(Segmenter(run), host, port)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))  # an ordinary end, which removes the uploads
    say(f"demo: {run} at {address} (Ctrl-C ends it)")
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listens])


def prepared(segmenter: Segmenter, host: str, port: int) -> tuple[Any, socket.socket, str]:
    """A server of the page that doesn't run yet, the socket it takes, and the address to open.

    Where more than this machine can reach the address, it holds a token without which nothing is answered.
    """
    gradio = _gradio()
    import uvicorn
    from fastapi import FastAPI

    listens = listening(host, port)
    folder, token = uploads(), None if is_loopback(listens) else secrets.token_urlsafe(24)
    page = build(segmenter, folder)
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    inner = gradio.mount_gradio_app(outer, page, path="/", **options())
    page.has_launched = True  # else gradio takes a path of this machine for an upload
    settings = uvicorn.Config(
        Door(inner, folder, host, token), log_level="warning", ws="none", timeout_graceful_shutdown=1
    )
    seen = socket.gethostname() if host in ANY and token else host
    shown = f"[{seen}]" if ":" in seen and not seen.startswith("[") else seen
    address = f"http://{shown}:{listens.getsockname()[1]}/{f'?token={token}' if token else ''}"
    return uvicorn.Server(settings), listens, address


def _gradio() -> Any:
    # Read when the package is imported, and nothing else stops it all.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            f"demo needs the package {error.name}: `make page`, or pip install --no-deps -r requirements-page.txt."
        ) from None
    return gradio


def options() -> dict[str, Any]:
    """How the page is served, address aside: without any part that would reach into a network or another folder."""
    gradio = _gradio()
    off = ("ssr_mode", "enable_monitoring", "mcp_server", "run_history", "pwa", "show_error")
    return dict.fromkeys(off, False) | {
        "footer_links": [],
        "allowed_paths": [],
        "max_file_size": MOST_UPLOADED,
        "theme": gradio.themes.Base(font=FONTS, font_mono=["ui-monospace", "monospace"]),
        "css": STYLE,
    }


def build(segmenter: Segmenter, folder: Path) -> Any:
    """The page as gradio's Blocks, not launched; its one function has the API name /segment.

    folder: where its uploads and pictures lie, and the only one that it opens files of.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    gradio = _gradio()
    checkpoint, gamma = segmenter.checkpoint, segmenter.config.eval.gamma
    title = f"Any image, any names: {segmenter.config.name}"
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(KEEP_S, KEEP_S)) as page:
        gradio.Markdown(f"# {title}\n{_about(segmenter)}")
        with gradio.Row():
            with gradio.Column():
                sources = ["upload", "clipboard"]
                image = gradio.Image(label="Image", type="filepath", image_mode=None, sources=sources, height=360)
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
                rejected = "none of these: where the best score is below (0: nowhere)"
                least = gradio.Slider(0, 1, value=0, step=0.01, label=rejected)
                button = gradio.Button("Segment", variant="primary")
            with gradio.Column():
                how = {"type": "pil", "format": "png", "interactive": False, "buttons": ["download"]}
                picture = gradio.Image(label="Found", height=360, **how)
                table = gradio.HTML()

        def segment(path: str | None, text: str, gamma: float, reject: float) -> tuple[Image.Image | None, str]:
            if path is not None and not is_own(path, folder):
                return None, wrong("This page opens no files of the machine it runs on: upload a picture.")
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
    """The painted picture and its legend as HTML; of a user's mistake no picture, and the line that says it.

    The line holds what the visitor sent and no path, content or state of this machine.
    """
    try:
        if path is None:
            raise UserError("Choose an image first.")
        _check_asked(text, gamma, reject)
        asked = _asked(segmenter, parsed_names(text, segmenter.checkpoint.classes))
        try:
            image = read_image(path)
        except DataError:  # whose line quotes the file
            raise UserError(
                f"{Path(path).name}: not a picture that can be read, or one of more than {MAX_PIXELS} pixels."
            ) from None
        (scores,) = segmenter.scores([image], asked, gamma)
        ids = segmenter.decide(scores, (image.shape[0], image.shape[1]), reject or None, asked=asked)
    except UserError as error:
        return None, wrong(str(error).removeprefix("--names "))
    return painted(image, ids, len(asked.names)), _table(shares(ids, asked.titles), asked)


def wrong(line: str) -> str:
    return f'<p class="wrong" role="alert">{html.escape(line)}</p>'


def _check_asked(text: Any, gamma: Any, reject: Any) -> None:
    """The page's own fields send nothing else; other programs may."""
    if not isinstance(text, str) or len(text) > MOST_TEXT:
        raise UserError(f"names: want a text of at most {MOST_TEXT} characters.")
    for name, value in (("gamma", gamma), ("none of these", reject)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{name}: want a number.")
    check(reject, None)


def _asked(segmenter: Segmenter, names: tuple[Name, ...]) -> Asked:
    try:
        return segmenter.ask(names)
    except UserError as error:
        if segmenter.is_closed:  # the names are wrong, and the line is about them alone
            raise
        say(f"demo: {error}")
        raise UserError(
            "Names that the student wasn't trained with are read by its teacher's text encoder, which can't be had "
            "here; the terminal where the page runs says why."
        ) from None


def _table(found: list[Share], asked: Asked) -> str:
    """A row for every name that was found: its colour, itself, its part of the image, and whether it had labels."""
    rows = []
    for share in found:
        look = 'hatched"' if share.id == IGNORE else f'" style="background: rgb{share.colour}"'
        swatch = f'<span class="swatch {look}></span>'
        trained = "" if share.id == IGNORE else "yes" if asked.is_trained[share.id] else "no"
        rows.append(
            f'<tr><td>{swatch} {html.escape(share.title)}</td><td class="share">{share.percent}</td>'
            f"<td>{trained}</td></tr>"
        )
    head = "<tr><th>name</th><th>part of the image</th><th>labelled in training</th></tr>"
    return f'<table class="found"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'
