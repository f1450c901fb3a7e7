"""The page: what it answers, asked in Python, over HTTP, and as a browser shows it (marker `page`)."""

import asyncio
import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from pipeline.config import UserError
from pipeline.demo import build, found, options, serve
from pipeline.learning.segmenter import Segmenter
from pipeline.looking.overlay import palette_of
from tests.conftest import is_one_line_error
from tests.test_predict import made_student, picture

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    return Segmenter(made_student(tmp_path_factory.mktemp("student") / "run"))


def test_without_gradio_one_line_says_what_to_install(segmenter, run_cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert is_one_line_error(run_cli("demo", segmenter.file), "gradio", "pip install 'clipteacher[demo]'")


def test_a_run_that_is_not_there(tmp_path, run_cli):
    assert is_one_line_error(run_cli("demo", tmp_path / "gone"), "gone", "cli.py train")


def test_what_is_found_is_the_mask_and_its_names(segmenter, tmp_path):
    photo = picture(tmp_path / "a.png", (400, 400))
    shown, table = found(segmenter, str(photo), "soil,<b>pond", 50.0, 0.0)
    assert shown.size == (400, 400)
    assert re.findall(r"<td>([^<]*)</td></tr>", table) == ["no"], (
        "gamma 50 leaves nothing but the strange name"
    )
    assert "&lt;b&gt;pond" in table
    assert "100 %" in table
    assert f"rgb{tuple(palette_of(2)[1].tolist())}" in table
    _, table = found(segmenter, str(photo), "soil", 0.0, 1.0)
    assert "none of these" in table


@pytest.mark.parametrize(
    ("text", "reject", "words"),
    [("soil,soil", 0.0, "different names"), ("", 0.0, "0 names"), ("soil", 2.0, "--reject 2.0")],
)
def test_a_mistake_is_a_line_in_the_page(segmenter, tmp_path, text, reject, words):
    shown, line = found(segmenter, str(picture(tmp_path / "a.png")), text, 0.0, reject)
    assert shown is None
    assert line.startswith('<p class="wrong"')
    assert words in line


def test_a_broken_upload_is_a_line_without_its_path(segmenter, tmp_path):
    (tmp_path / "a<b.jpg").write_bytes(b"no photograph")
    shown, line = found(segmenter, str(tmp_path / "a<b.jpg"), "soil", 0.0, 0.0)
    assert shown is None
    assert "a&lt;b.jpg: not a picture" in line
    assert str(tmp_path) not in line
    assert found(segmenter, None, "soil", 0.0, 0.0) == (
        None,
        '<p class="wrong" role="alert">Choose an image first.</p>',
    )


# ---- with gradio -------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def address(segmenter):
    page = build(segmenter)
    _, address, _ = page.launch(**options(), server_name="127.0.0.1", server_port=free_port())
    yield address
    page.close()


@pytest.mark.page
def test_over_http_it_answers_as_in_python(segmenter, address, tmp_path, capfd):
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False)
    photo = picture(tmp_path / "a.png", (60, 40))
    file, table = client.predict(handle_file(photo), "soil,leaf", 1.5, 0.0, api_name="/segment")
    wanted, html = found(segmenter, str(photo), "soil,leaf", 1.5, 0.0)
    assert np.array_equal(np.asarray(Image.open(file).convert("RGB")), np.asarray(wanted))
    assert table == html
    (tmp_path / "b.jpg").write_bytes(b"no photograph")
    for upload, names, words in (
        (photo, "a,a", "different"),
        (tmp_path / "b.jpg", "a", "b.jpg: not a picture"),
    ):
        file, line = client.predict(handle_file(upload), names, 1.5, 0.0, api_name="/segment")
        assert file is None
        assert words in line
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.page
def test_an_address_that_is_taken_is_one_line(segmenter, address):
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match=f"--port {port}"):
        serve(segmenter.file, "127.0.0.1", port)


class Tab:
    """A tab of a browser, over its debugging protocol (chromedevtools.github.io/devtools-protocol)."""

    def __init__(self, socket):
        self.socket, self.number, self.events = socket, itertools.count(1), []

    async def do(self, method, **parameters):
        number = next(self.number)
        await self.socket.write_message(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(await asyncio.wait_for(self.socket.read_message(), 60))
            if message.get("id") == number:
                return message["result"]
            self.events.append(message)

    async def value(self, expression):
        done = await self.do("Runtime.evaluate", expression=expression, returnByValue=True)
        return done["result"].get("value")

    async def wait_for(self, expression, seconds=60):
        for _ in range(10 * seconds):
            if found := await self.value(expression):
                return found
            await asyncio.sleep(0.1)
        raise TimeoutError(expression)

    def happened(self, *methods):
        return [event["params"] for event in self.events if event["method"] in methods]


@contextmanager
def browser(profile):
    """A headless Chromium; yields its debugging address."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert program, f"the marker page asks for one of {', '.join(BROWSERS)}"
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(running.stderr.readline, "")
        yield next(found[1] for line in lines if (found := re.search(r"ws://([^/]+)/", line)))
    finally:
        running.terminate()
        running.wait()
        running.stderr.close()


async def tried(at, address, width, photo):
    """Uploads a photograph in a window so wide; the tab, the result's text, and the page's own width."""
    from tornado.httpclient import AsyncHTTPClient
    from tornado.websocket import websocket_connect

    listed = json.loads((await AsyncHTTPClient().fetch(f"http://{at}/json")).body)
    target = next(each for each in listed if each["type"] == "page")
    tab = Tab(await websocket_connect(target["webSocketDebuggerUrl"]))
    for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
        await tab.do(f"{domain}.enable")
    await tab.do(
        "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
    )
    await tab.do("Page.navigate", url=address)
    await tab.wait_for("!!document.querySelector('input[type=file]')")
    root = (await tab.do("DOM.getDocument"))["root"]["nodeId"]
    place = await tab.do("DOM.querySelector", nodeId=root, selector="input[type=file]")
    await tab.do("DOM.setFileInputFiles", files=[str(photo)], nodeId=place["nodeId"])
    text = await tab.wait_for("document.querySelector('.found, .wrong')?.innerText")
    return tab, text, await tab.value("document.documentElement.scrollWidth")


@pytest.mark.page
@pytest.mark.parametrize("width", [1400, 400])
def test_in_a_browser(address, tmp_path, width):
    photo = picture(tmp_path / "a.png", (60, 40))
    with browser(tmp_path / "profile") as at:
        tab, text, wide = asyncio.run(tried(at, address, width, photo))
    assert "labelled in training" in text
    assert "%" in text
    assert wide <= width
    assert not tab.happened("Runtime.exceptionThrown")
    assert not [e for e in tab.happened("Runtime.consoleAPICalled") if e["type"] in ("error", "assert")]
    assert not [e for e in tab.happened("Log.entryAdded") if e["entry"]["level"] == "error"]
    asked = {event["request"]["url"] for event in tab.happened("Network.requestWillBeSent")}
    assert asked
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))], (
        "nothing of any network"
    )
