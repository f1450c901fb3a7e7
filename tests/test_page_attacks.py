"""The page as an attacker asks it: other people's files, foreign hosts and sites, addresses without their token."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from pipeline.config import UserError
from pipeline.demo import found
from pipeline.learning.segmenter import Segmenter
from pipeline.looking.visitors import Door, is_loopback, is_own, listening, uploads
from tests.conftest import ROOT
from tests.test_demo_page import served
from tests.test_predict import made_student, picture

META = {"_type": "gradio.FileData"}
SECRET = "correct horse battery"


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    return Segmenter(made_student(tmp_path_factory.mktemp("student") / "run"))


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    """A file and a picture of the machine that are no visitor's business."""
    folder = tmp_path_factory.mktemp("private")
    (folder / "secret.txt").write_text(SECRET)
    Image.new("RGB", (8, 8), "red").save(folder / "private.png")
    return folder


# ---- without gradio ----------------------------------------------------------------------------


def test_only_regular_files_that_really_lie_below_the_folder_are_uploads(tmp_path, secret):
    folder = (tmp_path / "own").resolve()
    (folder / "hash").mkdir(parents=True)
    (folder / "hash" / "a.png").write_bytes(b"a")
    (tmp_path / "own-not").mkdir()
    (tmp_path / "own-not" / "a.png").write_bytes(b"a")
    (folder / "link.png").symlink_to(secret / "private.png")
    (folder / "folder").symlink_to(secret)
    os.mkfifo(folder / "pipe")
    assert is_own(str(folder / "hash" / "a.png"), folder)
    for path in (
        *(secret / "private.png", tmp_path / "own-not" / "a.png", folder, folder / "hash", folder / "gone.png"),
        *(folder / "link.png", folder / "folder" / "private.png", folder / "pipe", folder / ".." / "own-not" / "a.png"),
        *("/etc/passwd", "/dev/zero", "hash/a.png", "", "http://example.com/a.png", "a\0b", "a" * 5000, 3, None, []),
        f"file://{folder}/hash/a.png",
    ):
        assert not is_own(path if isinstance(path, int | list | None) else str(path), folder), path


@pytest.mark.parametrize("gamma", [float("nan"), float("inf"), "1", None, True, [1.0]])
def test_numbers_that_are_none_are_a_line(segmenter, tmp_path, gamma):
    photo = str(picture(tmp_path / "a.png"))
    for numbers in ((gamma, 0.0), (0.0, gamma)):
        shown, line = found(segmenter, photo, "soil", *numbers)
        assert shown is None
        assert "want a number" in line


def test_a_picture_s_bytes_are_in_no_line(segmenter, secret):
    shown, line = found(segmenter, str(secret / "secret.txt"), "soil", 0.0, 0.0)
    assert shown is None
    assert "secret.txt: not a picture" in line
    assert SECRET[:4] not in line
    assert str(secret) not in line


def test_a_teacher_that_can_not_be_had_is_a_line_without_its_path(tmp_path, capsys):
    run = made_student(
        tmp_path / "run", "teacher.model=ViT-B-16", "teacher.pretrained=/private/place/w.pt", "teacher.quick_gelu=false"
    )
    shown, line = found(Segmenter(run), str(picture(tmp_path / "a.png")), "a strange name", 0.0, 0.0)
    assert shown is None
    assert "text encoder" in line
    assert "private" not in line
    assert "/private/place/w.pt" in capsys.readouterr().err, "whoever runs the page reads why"


HOLD = "import sys; from pipeline.looking.visitors import uploads; print(uploads(), flush=True); sys.stdin.read()"


def test_a_killed_page_s_uploads_are_removed_at_the_next_start(tmp_path):
    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return process, Path(process.stdout.readline().strip())

    (tmp_path / "clipteacher-page-link").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    living, mine = start()
    killed, left = start()
    (left / "upload.png").write_bytes(b"a")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert left.is_dir()
    ended, last = start()
    assert not left.exists()
    assert mine.is_dir()
    assert (tmp_path / "kept").is_dir()
    assert last.stat().st_mode & 0o077 == 0
    ended.communicate("")
    assert not last.exists()
    living.communicate("")


@pytest.mark.parametrize(("host", "words"), [("203.0.113.1", "203.0.113.1"), ("no.such.host.invalid", "--host")])
def test_an_address_of_another_machine_is_one_line(host, words):
    with pytest.raises(UserError, match=words):
        listening(host, 0)


@pytest.mark.parametrize(("host", "only_here"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])
def test_which_addresses_only_this_machine_reaches(host, only_here):
    with listening(host, 0) as listens:
        assert is_loopback(listens) == only_here


# ---- with gradio -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(segmenter):
    with served(segmenter) as address:
        yield address


def ask(address, path, body=None, *, method=None, kind="application/json", **headers):
    """Status and text of one request; header names with _ for -; Host and Content-Length as given."""
    where = urlsplit(address)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.putrequest(
        method or ("GET" if body is None else "POST"), path, skip_host=True, skip_accept_encoding=True
    )
    sent = {"Host": where.netloc} | {name.replace("_", "-"): value for name, value in headers.items()}
    if content is not None:
        sent |= {"Content-Type": kind, "Content-Length": str(len(content))}
    for name, values in sent.items():
        for value in values if isinstance(values, list) else [values]:
            connection.putheader(name, value)
    connection.endheaders(content)
    answer = connection.getresponse()
    text = answer.read().decode("utf-8", "replace")
    connection.close()
    return answer.status, text, dict(answer.getheaders())


def upload(address, path, **headers):
    mark = uuid.uuid4().hex
    start = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'
    body = start.encode() + path.read_bytes() + f"\r\n--{mark}--\r\n".encode()
    kind = f"multipart/form-data; boundary={mark}"
    status, text, _ = ask(address, "/gradio_api/upload", body, kind=kind, **headers)
    assert status == 200, text
    return json.loads(text)[0]


def segment(address, image, names="soil", **headers):
    """What /segment answers, by the short way in; the page's own is the queue."""
    return ask(address, "/gradio_api/run/segment", {"data": [image, names, 0.0, 0.0]}, **headers)


@pytest.mark.page
def test_an_upload_is_painted_and_can_be_fetched(page, tmp_path):
    mine = upload(page, picture(tmp_path / "a.png"))
    status, text, _ = segment(page, {"path": mine, "meta": META})
    assert status == 200
    shown, table = json.loads(text)["data"]
    assert "part of the image" in table
    assert ask(page, f"/gradio_api/file={shown['path']}")[0] == 200
    status, text, _ = ask(page, "/gradio_api/call/segment", {"data": [{"path": mine, "meta": META}, "soil", 0.0, 0.0]})
    assert status == 200
    assert "part of the image" in ask(page, f"/gradio_api/call/segment/{json.loads(text)['event_id']}")[1]
    name = f"{uuid.uuid4().hex}.png"
    (uploads() / name).symlink_to("/etc/passwd")
    assert ask(page, f"/gradio_api/file={uploads() / name}")[0] == 404


@pytest.mark.page
@pytest.mark.parametrize("wrapped", [True, False], ids=["with meta", "without"])
@pytest.mark.parametrize("place", ["image", "names"])
def test_no_file_of_the_machine_is_opened(page, secret, capfd, wrapped, place):
    paths = [
        str(secret / "private.png"),
        str(secret / "secret.txt"),
        "/etc/passwd",
        str(ROOT / "README.md"),
        "README.md",
    ]
    paths += [f"{uploads()}/../../etc/passwd", f"{uploads()}", "http://127.0.0.1:1/a.png", "file:///etc/passwd", "a\0b"]
    for path in paths:
        file = {"path": path} | ({"meta": META, "url": path} if wrapped else {})
        data = [file, "soil", 0.0, 0.0] if place == "image" else [None, file, 0.0, 0.0]
        for route in ("run/segment", "api/segment", "call/segment"):
            status, text, _ = ask(page, f"/gradio_api/{route}", {"data": data})
            assert status == 403, (path, text)
            assert SECRET not in text
            assert "root:" not in text
        joined = {"data": data, "fn_index": 0, "session_hash": "a", "trigger_id": None}
        assert ask(page, "/gradio_api/queue/join", joined)[0] == 403
    assert not [left for left in uploads().rglob("*") if left.name in ("private.png", "secret.txt", "passwd")]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.page
def test_what_is_no_picture_says_neither_bytes_nor_path(page, secret):
    mine = upload(page, secret / "secret.txt")
    status, text, _ = segment(page, {"path": mine, "meta": META})
    assert status == 200
    assert "secret.txt: not a picture" in text
    assert SECRET[:4] not in text
    assert str(uploads()) not in json.loads(text)["data"][1]


@pytest.mark.page
@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/file=/etc/passwd", "/gradio_api/file=README.md", "/gradio_api/file=http://example.com/a"),
        *("/gradio_api/file=%2Fetc%2Fpasswd", "/gradio_api/file//etc/passwd", "/file=/etc/passwd", "/file/etc/passwd"),
        *("/gradio_api/proxy=https://example.com/", "/monitoring", "/monitoring/summary", "/gradio_api/runs", "/login"),
        *(
            "/static/../../../etc/passwd",
            "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
            "/assets/..%2f..%2f..%2fetc/passwd",
        ),
        *(
            "/docs",
            "/openapi.json",
            "/gradio_api/openapi.json",
            "/gradio_api/deep_link",
            "/gradio_api/vibe-code/",
            "//",
        ),
        "/gradio_api/custom_component/a/server/component/../../../../etc/passwd",
    ],
)
def test_other_routes_and_files_are_not_there(page, path):
    status, text, _ = ask(page, path)
    assert status in (403, 404), text
    assert "root:" not in text


@pytest.mark.page
@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "", "10.0.0.1"),
        *("localhost.evil.example:80", "0.0.0.0", "[::2]", "127.0.0.1:80:80", "evil.example#127.0.0.1"),
        ["127.0.0.1", "evil.example"],
        [],
    ],
    ids=repr,
)
def test_a_foreign_host_is_answered_nothing(page, tmp_path, host):
    """DNS rebinding: a site's own name that resolves to this machine makes its scripts the page's own."""
    preflight = {"Origin": "http://evil.example", "Access_Control_Request_Method": "POST"}
    segment = {"data": [None, "a", 0.0, 0.0]}
    for path, body, more in (
        *(("/", None, {}), ("/config", None, {}), ("/gradio_api/run/segment", segment, {})),
        *(("/gradio_api/upload", b"", {}), ("/gradio_api/upload", None, {"method": "OPTIONS"} | preflight)),
    ):
        try:
            status, text, headers = ask(page, path, body, Host=host, **more)
        except ConnectionResetError:
            continue  # the server hangs up on no host or two; its 400 is lost where it left the body unread
        assert status in (400, 421), text  # 400: the server itself, of no host or two
        assert "gradio" not in text
        assert "access-control-allow-origin" not in {name.lower() for name in headers}


@pytest.mark.page
def test_the_page_s_own_names_are_answered(page):
    port = urlsplit(page).port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}", "localhost:8000"):
        assert ask(page, "/config", Host=host)[0] == 200, host  # 8000: as through a forwarded port
        assert ask(page, "/config", Host=host, Origin=f"http://{host.lower()}")[0] == 200, host


@pytest.mark.page
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "file://", "", "127.0.0.1"])
def test_another_site_is_answered_nothing(page, origin):
    preflight = {"Origin": origin, "Access_Control_Request_Method": "POST"}
    for path, body, method in (
        ("/config", None, "GET"),
        ("/gradio_api/upload", b"", "POST"),
        ("/gradio_api/run/segment", {"data": [None, "a", 0.0, 0.0]}, "POST"),
        ("/gradio_api/run/segment", None, "OPTIONS"),
    ):
        status, text, headers = ask(page, path, body, method=method, **preflight)
        assert status == 403, text
        assert "access-control-allow-origin" not in {name.lower() for name in headers}


@pytest.mark.page
@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"[" * 100_000, 400), (b'{"data": "' + b"a" * 2**20 + b'"}', 413), (b"\xff\xfe", 400)],
    ids=["cut", "deep", "large", "no text"],
)
def test_questions_that_are_none(page, capfd, body, status):
    assert ask(page, "/gradio_api/run/segment", body)[0] == status
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.page
def test_beyond_this_machine_the_page_needs_its_token(segmenter, tmp_path):
    with served(segmenter, "0.0.0.0") as address:
        token = urlsplit(address).query.removeprefix("token=")
        assert len(token) >= 32
        here = f"http://127.0.0.1:{urlsplit(address).port}"
        for path, body in (
            *(("/", None), ("/config", None), ("/?token=", None), (f"/?token={token[:-1]}", None)),
            *((f"/config?token={token}", None), ("/gradio_api/upload", b""), ("/gradio_api/run/segment", {"data": []})),
            *(("/gradio_api/startup-events", None), ("/assets/a.js", None), ("/?token=%ff%fe", None)),
        ):
            for headers in ({}, {"Cookie": "clipteacher=1"}, {"Authorization": "Bearer "}, {"Authorization": "é"}):
                status, text, _ = ask(here, path, body, **headers)
                assert status == 401, (path, text)
                assert token not in text
        status, _, headers = ask(here, f"/?token={token}")
        assert status == 303
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Lax" in cookie
        assert headers["location"] == "/"
        known = {"Cookie": f"other=1; {cookie.partition(';')[0]}"}
        assert ask(here, "/", **known)[0] == 200
        mine = upload(here, picture(tmp_path / "a.png"), **known)
        assert "part of the image" in segment(here, {"path": mine, "meta": META}, **known)[1]
        assert ask(here, "/config", Authorization=f"Bearer {token}", Host="a-name-of-this-machine:80")[0] == 200
        assert ask(here, "/config", Origin="http://evil.example", **known)[0] == 403


@pytest.mark.page
def test_the_command_says_its_address_and_leaves_nothing(segmenter, tmp_path):
    """Killed by SIGTERM it removes its uploads, by SIGKILL the next page does."""

    def start():
        command = [sys.executable, "cli.py", "demo", str(segmenter.file), "--port", "0"]
        environment = os.environ | {"TMPDIR": str(tmp_path), "COLUMNS": "300"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        line = next(line for line in process.stderr if line.startswith("demo: "))
        address = next(word for word in line.split() if word.startswith("http"))
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                upload(address, picture(tmp_path / "a.png"))
                break
            except OSError:
                time.sleep(0.1)
        return process

    def left():
        return [path for path in tmp_path.iterdir() if path.name != "a.png"]

    process = start()
    assert len(left()) == 1
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert left() == []
    process = start()
    process.kill()
    process.communicate()
    assert len(left()) == 1
    process = start()
    assert len(left()) == 1
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert left() == []
    assert "Traceback" not in said


def test_a_door_names_nobody():
    """Each page has its own cookie: cookies of one host don't tell its ports apart."""
    one, other = (Door(None, Path("/nowhere"), "127.0.0.1", "a") for _ in range(2))
    assert one.cookie != other.cookie
