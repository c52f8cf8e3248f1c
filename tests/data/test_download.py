"""Downloads from a local https server: complete and verified, or a one-line error and no files left behind."""

import hashlib
import io
import os
import ssl
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trustme

from reslearn.data import download
from reslearn.data.download import OFFICIAL, OfficialSet, RemoteFile, fetch, locate, unpack_tar
from reslearn.errors import UserError

BODY = bytes(range(256)) * 9000  # 2.3 MB: more than one block
SHA = "sha256:" + hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    redirects: dict[str, str]
    stop: threading.Event
    sent = 0

    def do_GET(self) -> None:
        if self.path in self.redirects:
            self.send_response(302)
            self.send_header("Location", self.redirects[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path == "/nonsense":
            self.wfile.write(b"no HTTP at all\r\n\r\n")
            return
        if self.path not in ("/good", "/cut", "/endless", "/stalls", *self.files):
            self.send_error(404, "Not Found")
            return
        self.send_response(200)
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(self.files.get(self.path, BODY))))
        self.end_headers()
        try:
            if self.path == "/cut":
                self.wfile.write(BODY[: len(BODY) // 2])
            elif self.path == "/stalls":
                self.wfile.write(BODY[:1000])
                self.wfile.flush()
                self.stop.wait(20)
            elif self.path == "/endless":
                while not self.stop.is_set():
                    type(self).sent += self.wfile.write(BODY)
            else:
                self.wfile.write(self.files.get(self.path, BODY))
        except OSError:  # the client has disconnected, as expected
            pass

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that rejects the certificate or disconnects


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def server(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an https server that this process trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    (tmp_path / "trust").mkdir()
    authority.cert_pem.write_to_path(str(tmp_path / "trust" / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "trust" / "ca.pem"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Handler.files, Handler.redirects, Handler.stop, Handler.sent = {}, {}, threading.Event(), 0
    with Server(("localhost", 0), Handler) as https:
        https.socket = context.wrap_socket(https.socket, server_side=True)
        thread = threading.Thread(target=https.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"https://localhost:{https.server_port}"
        Handler.stop.set()
        https.shutdown()
        thread.join()


def test_success(server: str, tmp_path: Path) -> None:
    Handler.redirects = {"/moved": "/again", "/again": f"{server}/good"}
    for path, checksum in (("good", SHA), ("moved", "md5:" + hashlib.md5(BODY).hexdigest())):
        target = tmp_path / "new" / "folder" / path
        assert fetch(f"{server}/{path}", target, checksum=checksum, size=len(BODY)) == target
        assert target.read_bytes() == BODY
        fetch(f"{server}/{path}", target, checksum=checksum, size=len(BODY))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["good", "moved"]


BAD = {
    # path: size, checksum, part of the message
    "/good": (len(BODY), "sha256:" + "0" * 64, "sha256 is"),
    "/cut": (len(BODY), SHA, f"connection closed after {len(BODY) // 2:,} of {len(BODY):,} bytes"),
    "/nonsense": (len(BODY), SHA, "no HTTP at all"),
    "/good?": (len(BODY), SHA, "HTTP error 404 Not Found"),
    "/endless": (len(BODY) * 2, SHA, f"larger than the expected {len(BODY) * 2:,} bytes"),
    "/stalls": (len(BODY), SHA, "timed out"),
    "/to-http": (len(BODY), SHA, "http://localhost/good: not https"),
    "/to-file": (len(BODY), SHA, "Redirection to url 'file:///etc/hostname' is not allowed"),
    "/in-circles": (len(BODY), SHA, "redirect"),
}


@pytest.mark.parametrize("path", BAD)
def test_failures_keep_the_old_file_and_leave_no_others(
    path: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    Handler.redirects = {
        "/to-http": "http://localhost/good",
        "/to-file": "file:///etc/hostname",
        "/in-circles": f"{server}/in-circles",
    }
    size, checksum, fragment = BAD[path]
    target = tmp_path / "cache" / "file"
    target.parent.mkdir()
    target.write_bytes(b"before")
    with pytest.raises(UserError) as caught:
        fetch(server + path, target, checksum=checksum, size=size)
    assert fragment in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in target.parent.iterdir()] == ["file"] and target.read_bytes() == b"before"
    if path == "/endless":
        assert Handler.sent < 20 * len(BODY)


def test_one_byte_too_many_or_too_few(server: str, tmp_path: Path) -> None:
    for size, fragment in ((len(BODY) - 1, "larger than"), (len(BODY) + 1, "connection closed after")):
        with pytest.raises(UserError, match=fragment):
            fetch(f"{server}/good", tmp_path / "file", checksum=SHA, size=size)


def test_only_https(tmp_path: Path) -> None:
    for url in ("http://localhost/a", "file:///etc/hostname", "ftp://localhost/a", "//localhost/a", "data:,a"):
        with pytest.raises(UserError, match="not https"):
            fetch(url, tmp_path / "a", checksum=SHA, size=1)
    assert not list(tmp_path.iterdir())


def test_an_unknown_certificate_is_rejected(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "trust" / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    monkeypatch.setenv("SSL_CERT_FILE", str(other))
    with pytest.raises(UserError, match="certificate verify failed"):
        fetch(f"{server}/good", tmp_path / "file", checksum=SHA, size=len(BODY))


def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"https://example\.invalid/a: .*refused"):
        fetch("https://example.invalid/a", tmp_path / "a", checksum=SHA, size=1)


def test_ctrl_c_leaves_no_files(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def interrupt(*_: object) -> None:
        seen.extend((tmp_path / "cache").iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{server}/good", tmp_path / "cache" / "file", checksum=SHA, size=len(BODY))
    assert len(seen) == 1 and not list((tmp_path / "cache").iterdir())


def test_progress_is_shown_on_terminals_only(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for terminal, lines in ((False, 0), (True, 1)):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        fetch(f"{server}/good", tmp_path / "file", checksum=SHA, size=len(BODY))
        shown = capsys.readouterr()
        assert not shown.out and shown.err.count("\n") == lines
    assert shown.err.endswith("\rfile: 2 of 2 MB\n")


def archive(path: Path, *members: tuple[str, bytes | str | None]) -> Path:
    """A .tar.gz of files (bytes), symbolic links (str, the target) and folders (None)."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.type = tarfile.DIRTYPE
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_only_the_named_members_are_unpacked(tmp_path: Path) -> None:
    tar = archive(
        tmp_path / "a.tar",
        ("set", None),
        ("set/a.bin", b"aaa"),
        ("../outside", b"x"),
        ("/tmp/absolute", b"x"),
        ("link", "/etc/hostname"),
        ("set/b.bin", b""),
    )
    target = tmp_path / "cache" / "new"
    (target / "set").mkdir(parents=True)
    (target / "set" / "a.bin").write_bytes(b"old")
    unpack_tar(tar, target, {"set/a.bin": 3, "set/b.bin": 0})
    assert files_in(tmp_path / "cache") == {"new/set/a.bin": b"aaa", "new/set/b.bin": b""}


BAD_ARCHIVES = {
    "size": ([("a", b"aaaa")], "a has 4 bytes instead of 3: download the archive again"),
    "link": ([("a", "/etc/hostname")], "a is duplicate or not a regular file"),
    "folder": ([("a", None)], "a is duplicate or not a regular file"),
    "twice": ([("a", b"aaa"), ("a", b"bbb")], "a is duplicate or not a regular file"),
    "missing": ([("c", b"aaa")], "a is missing or truncated"),
}


@pytest.mark.parametrize("name", BAD_ARCHIVES)
def test_bad_archives(name: str, tmp_path: Path) -> None:
    members, fragment = BAD_ARCHIVES[name]
    tar = archive(tmp_path / "a.tar.gz", ("b", b"bbb"), *members)  # type: ignore[arg-type]
    (tmp_path / "cache").mkdir()
    with pytest.raises(UserError) as caught:
        unpack_tar(tar, tmp_path / "cache", {"a": 3, "b": 3})
    assert fragment in str(caught.value) and str(tar) in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


def test_damaged_archives(tmp_path: Path) -> None:
    members = {"a": 60_000}
    whole = archive(tmp_path / "a.tar.gz", ("a", os.urandom(60_000))).read_bytes()
    text = archive(tmp_path / "a.tar.gz", ("a", " ".join(map(str, range(20_000))).encode()[:60_000])).read_bytes()
    damaged = [text[:i] + b"\xff" * 50 + text[i + 50 :] for i in range(100, len(text) - 50, 800)]
    for data in (b"", b"<html>", whole[:1000], whole[:-3000], *damaged):
        (tmp_path / "a.tar.gz").write_bytes(data)
        with pytest.raises(UserError, match=r"a\.tar\.gz: .*(damaged|truncated|cannot be unpacked)"):
            unpack_tar(tmp_path / "a.tar.gz", tmp_path / "cache", members)
        assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack_tar(tmp_path / "gone.tar.gz", tmp_path / "cache", members)


def test_the_table_of_official_sets() -> None:
    assert list(OFFICIAL) == ["fashion-mnist", "cifar10", "cifar100"]
    for official in OFFICIAL.values():
        for source in official.sources:
            kind, _, value = source.checksum.partition(":")
            assert len(value) == 2 * hashlib.new(kind).digest_size and source.url.startswith("https://")
    assert sum(OFFICIAL["cifar10"].files.values()) == 60_000 * 3073
    assert sum(OFFICIAL["cifar100"].files.values()) == 60_000 * 3074


@pytest.fixture
def tiny(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OfficialSet:
    """A set of two files in an archive on the server, with empty local folders."""
    data = archive(tmp_path / "tiny.tar.gz", ("tiny-bin/a.bin", b"aaa"), ("tiny-bin/b.bin", b"bb")).read_bytes()
    Handler.files = {"/tiny.tar.gz": data}
    source = RemoteFile(f"{server}/tiny.tar.gz", "sha256:" + hashlib.sha256(data).hexdigest(), len(data))
    official = OfficialSet("tiny-bin", {"a.bin": 3, "b.bin": 2}, (source,))
    monkeypatch.setitem(OFFICIAL, "tiny", official)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("RESLEARN_DATA", str(tmp_path / "data"))
    return official


def test_locate_downloads_once(tiny: OfficialSet, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "reslearn" / "tiny-bin"
    assert locate("tiny") == folder
    assert files_in(tmp_path / "cache") == {"reslearn/tiny-bin/a.bin": b"aaa", "reslearn/tiny-bin/b.bin": b"bb"}
    assert [p.name for p in folder.parent.iterdir()] == ["tiny-bin"]
    Handler.files = {}
    assert locate("tiny") == folder
    (folder / "b.bin").unlink()
    with pytest.raises(UserError, match="404"):
        locate("tiny")


def test_locate_searches_the_users_folders_first(tiny: OfficialSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locate("tiny")
    for folder in (tmp_path / "data" / "tiny-bin", tmp_path / "data"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.bin").write_bytes(b"aaa")
        assert locate("tiny") != folder
        (folder / "b.bin.gz").write_bytes(b"unread")
        assert locate("tiny") == folder
    monkeypatch.setenv("RESLEARN_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert locate("tiny") == tmp_path / "home" / ".cache" / "reslearn" / "tiny-bin"


def test_locate_reports_the_folders_searched_and_what_to_do(tiny: OfficialSet, tmp_path: Path) -> None:
    Handler.files = {}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.bin").write_bytes(b"bb")
    with pytest.raises(UserError) as caught:
        locate("tiny")
    message = str(caught.value)
    assert f"tiny is not in {tmp_path}/data (incomplete), {tmp_path}/data/tiny-bin, {tmp_path}/cache/reslearn" in message
    assert "cannot be downloaded" in message and "404" in message
    assert "unpack into tiny-bin/, and set RESLEARN_DATA to the folder that contains it" in message


def test_locate_without_a_usable_cache(tiny: OfficialSet, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    with pytest.raises(UserError, match="cannot be downloaded"):
        locate("tiny")


def test_files_without_an_archive(tiny: OfficialSet, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Handler.files = {"/a-idx.gz": b"aaa", "/b-idx.gz": b"bb"}
    sources = tuple(
        RemoteFile(server + path, "md5:" + hashlib.md5(data).hexdigest(), len(data)) for path, data in Handler.files.items()
    )
    monkeypatch.setitem(OFFICIAL, "tiny", OfficialSet("tiny", {"a-idx": 0, "b-idx": 0}, sources))
    assert files_in(locate("tiny")) == {"a-idx.gz": b"aaa", "b-idx.gz": b"bb"}
