"""What stands between the page and whoever asks it: its address, its token, its routes, and the files it may open.

The page runs with the rights of the person who started it, and any web site that this person looks at can send it
requests. So a request must name the page's own address (a foreign name that resolves to this machine doesn't), must not
come from another site, must know the token where more than this machine can reach the page, takes only the routes that
the page itself takes, and names no file but the page's own uploads.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import ipaddress
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pipeline.config import UserError

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
ANY = ("0.0.0.0", "::")
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]/@\s]+)(:\d+)?")
# What gradio's page and client ask for; gradio has more: proxies, recordings, editors, monitoring.
OPEN = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?|/(assets|static|svelte)/.+"
    r"|/gradio_api/(info|app_id|theme\.css|startup-events|upload|upload_progress|queue/join|queue/data|cancel|reset"
    r"|(call|run|api)/segment|call/segment/\w+|heartbeat/\w+|user|login_check|file=(?P<file>.+))/?"
)
UPLOADS = re.compile(r"/gradio_api/upload/?")
MOST_ASKED = 2**20  # bytes of a request that uploads nothing: names, two numbers, and the name of an upload
PREFIX = "clipteacher-page-"

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at the address. Raises: UserError where it can't be had."""
    bare = host.removeprefix("[").removesuffix("]")
    try:
        family = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((bare, port), family=family)
    except (OSError, OverflowError, UnicodeError):
        raise UserError(
            f"--host {host} --port {port}: nobody can listen there; the port is taken, or the host isn't this machine. "
            "Choose another."
        ) from None


def is_loopback(listens: socket.socket) -> bool:
    """Whether only this machine can reach the address."""
    return ipaddress.ip_address(listens.getsockname()[0].partition("%")[0]).is_loopback


@functools.lru_cache(maxsize=1)
def uploads() -> Path:
    """This process's own folder for uploads, removed when it ends; those of pages that were killed are removed now.

    A page holds a lock on its folder as long as it lives, however it ends.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if (held := _locked(old)) is not None:
            shutil.rmtree(old, ignore_errors=True)
            os.close(held)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()  # for nobody else: mode 0700
        # It isn't, if another page took it for an old one.
        if _locked(folder) is not None and folder.is_dir():
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            return folder


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the lock of a folder of ours; None where somebody else does, or it is another's."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_uid == os.getuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def is_own(path: Any, folder: Path) -> bool:
    """Whether a path that a visitor names is an upload: a regular file that really lies below the page's folder."""
    try:
        real = Path(os.path.realpath(path))
        return real.is_relative_to(folder) and real.is_file() and Path(path).is_absolute()
    except (OSError, TypeError, ValueError):  # names that are none, too long, or hold a NUL
        return False


class Door:
    """An ASGI application before the page: what is no visitor's business never reaches the page.

    host: as given to --host; token: what a visitor must know, None on an address that only this machine reaches.
    """

    def __init__(self, page: Any, folder: Path, host: str, token: str | None) -> None:
        self.page, self.folder, self.token = page, folder, token
        own = host if host.startswith("[") or ":" not in host else f"[{host}]"
        # None: whatever this machine is called.
        self.hosts = None if host in ANY else {*LOOPBACK, own.lower()}
        # Cookies belong to a host, whatever its port: each page has its own.
        self.cookie = f"clipteacher-{secrets.token_hex(4)}"

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.page(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        refused = self._refused(scope, headers)
        if refused is None and scope["method"] == "POST" and not UPLOADS.fullmatch(scope["path"]):
            refused, receive = await self._read(receive)
        if refused is not None:
            return await _answer(send, *refused)
        await self.page(scope, receive, send)

    def _refused(self, scope: dict[str, Any], headers: list[tuple[str, str]]) -> tuple[Any, ...] | None:
        """Status, text and headers of the answer to a request that isn't let in."""
        hosts = [value.lower() for name, value in headers if name == "host"]
        named = HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if not named or (self.hosts is not None and named[1] not in self.hosts):
            return 421, "This page has another address: see the terminal where it runs."
        for name, value in headers:
            if name == "origin" and urlsplit(value).netloc.lower() != hosts[0]:
                return 403, "This page answers no other site."
        if self.token is not None and not self._knows(headers):
            asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if scope["path"] == "/" and _same(asked, self.token):
                kept = f"{self.cookie}={self.token}; HttpOnly; SameSite=Lax; Path=/"
                return 303, "", (("location", "/"), ("set-cookie", kept), ("referrer-policy", "no-referrer"))
            return 401, "This page needs its whole address, with the token: see the terminal where it runs."
        taken = OPEN.fullmatch(scope["path"])
        if not taken or (taken["file"] and not is_own(taken["file"], self.folder)):
            return 404, "This page has no such part."
        return None

    def _knows(self, headers: list[tuple[str, str]]) -> bool:
        """Whether a request brings the token: the cookie of a browser that was here, or a client's header."""
        for name, value in headers:
            if name == "authorization" and _same(value.removeprefix("Bearer "), str(self.token)):
                return True
            if name == "cookie" and _same(_cookies(value).get(self.cookie, ""), str(self.token)):
                return True
        return False

    async def _read(self, receive: Receive) -> tuple[tuple[Any, ...] | None, Receive]:
        """The body of a request that asks something: refused if it names a file of this machine; else to be read again.

        gradio looks after paths of its own kind alone; what it gives a component as it came, this finds, too.
        """
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            body += message.get("body", b"")
            if len(body) > MOST_ASKED:
                return (413, f"A question has at most {MOST_ASKED} bytes."), receive
            if not message.get("more_body"):
                break
        try:
            foreign = body.strip() and any(not is_own(path, self.folder) for path in _paths(json.loads(body)))
        except (ValueError, RecursionError):
            return (400, "A question is JSON."), receive
        if foreign:
            line = "Choose a picture of your own first: this page opens no files of this machine."
            return (403, line), receive
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> dict[str, Any]:
            return waiting.pop() if waiting else await receive()

        return None, again


def _paths(asked: Any) -> Iterator[Any]:
    """Every value in a question that stands under "path"."""
    todo = [asked]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo.extend(value.values())
            if value.get("path") is not None:
                yield value["path"]
        elif isinstance(value, list):
            todo.extend(value)


def _cookies(header: str) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(header).items()}
    except CookieError:
        return {}


def _same(one: str, other: str) -> bool:
    return secrets.compare_digest(one.encode(), other.encode())


async def _answer(send: Send, status: int, text: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
    body = text.encode()
    told = (("content-type", "text/plain; charset=utf-8"), ("content-length", str(len(body))), *headers)
    pairs = [(name.encode(), value.encode()) for name, value in told]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
