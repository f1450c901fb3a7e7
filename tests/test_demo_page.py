"""The page: what it answers, asked in Python, over HTTP, and as a browser shows it (marker `page`)."""

import contextlib
import re
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from pipeline.config import UserError
from pipeline.demo import found, prepared, serve
from pipeline.learning.segmenter import Segmenter
from pipeline.looking.overlay import palette_of
from tests.browser import Browser
from tests.conftest import is_one_line_error
from tests.test_predict import made_student, picture


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    return Segmenter(made_student(tmp_path_factory.mktemp("student") / "run"))


def test_without_gradio_one_line_says_what_to_install(segmenter, run_cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert is_one_line_error(run_cli("demo", segmenter.file), "gradio", "make page", "requirements-page.txt")


def test_a_run_that_is_not_there(tmp_path, run_cli):
    assert is_one_line_error(run_cli("demo", tmp_path / "gone"), "gone", "cli.py train")


def test_what_is_found_is_the_mask_and_its_names(segmenter, tmp_path):
    photo = picture(tmp_path / "a.png", (400, 400))
    shown, table = found(segmenter, str(photo), "soil,<b>pond", 50.0, 0.0)
    assert shown.size == (400, 400)
    assert re.findall(r"<td>([^<]*)</td></tr>", table) == ["no"], "gamma 50 leaves nothing but the strange name"
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


@contextlib.contextmanager
def served(segmenter, host="127.0.0.1"):
    """The page's address, for as long as it is served by a thread of this process."""
    server, listens, address = prepared(segmenter, host, 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listens]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield address
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def address(segmenter):
    with served(segmenter) as address:
        yield address


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
    for upload, names, words in ((photo, "a,a", "different"), (tmp_path / "b.jpg", "a", "b.jpg: not a picture")):
        file, line = client.predict(handle_file(upload), names, 1.5, 0.0, api_name="/segment")
        assert file is None
        assert words in line
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.page
def test_an_address_that_is_taken_is_one_line(segmenter, address):
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match=f"--port {port}"):
        serve(segmenter.file, "127.0.0.1", port)


@pytest.mark.page
@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1400, False), (400, True)])
def test_in_a_browser(address, tmp_path, width, dark):
    photo = picture(tmp_path / "a.png", (60, 40))
    with Browser() as tab:
        tab.open(address, width=width, dark=dark)
        wait_for(tab, "!!document.querySelector('input[type=file]')")
        root = tab.send("DOM.getDocument")["root"]["nodeId"]
        place = tab.send("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
        tab.send("DOM.setFileInputFiles", files=[str(photo)], nodeId=place)
        text = wait_for(tab, "document.querySelector('.found, .wrong')?.innerText")
        assert "labelled in training" in text
        assert "%" in text
        assert tab.run("document.documentElement.scrollWidth") <= width
        # What gradio's own client logs whenever it closes a stream; it is a warning.
        assert not [error for error in tab.errors if "Method not implemented" not in error]
        assert tab.requests
        own = (address, "data:", "blob:")
        assert not [url for url in tab.requests if not url.startswith(own)], "nothing of any network"


def wait_for(tab, expression, seconds=60):
    end = time.monotonic() + seconds
    while not (found := tab.run(expression)):
        assert time.monotonic() < end, expression
        time.sleep(0.1)
    return found
