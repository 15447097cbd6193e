"""Archives from a local server that can, or cannot, send the rest of a file."""

import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import download
import pytest
import run
from errors import UserError


def packed(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


class Server(BaseHTTPRequestHandler):
    content, ranges, cut = b"", True, None

    def do_GET(self):
        self.server.seen.append(self.headers.get("Range"))
        if self.path != "/tasks/afqmc_public.zip":
            self.send_error(404)
            return
        content, start = self.content, 0
        if self.ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """The address of a mirror; `Server` says what it does."""
    content = packed(
        **{"afqmc_public/train.json": "{}\n", "__MACOSX/x": "", "afqmc_public/b": ""}
    )
    monkeypatch.setattr(Server, "content", content)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def mirror(server):
    return f"http://127.0.0.1:{server.server_port}/tasks/"


@pytest.fixture(autouse=True)
def known(server, monkeypatch):
    archive = download.Archive(
        "afqmc_public.zip", hashlib.sha256(Server.content).hexdigest(), len(Server.content)
    )
    monkeypatch.setitem(download.ARCHIVES, "afqmc", archive)


def files(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def test_the_files_without_the_folder_around_them(mirror, server, tmp_path):
    (tmp_path / "clue" / "afqmc").mkdir(parents=True)
    download.download("afqmc", tmp_path / "clue" / "afqmc", mirror)
    assert files(tmp_path) == ["clue", "clue/afqmc", "clue/afqmc/b", "clue/afqmc/train.json"]
    download.download("afqmc", tmp_path / "clue" / "afqmc", mirror)
    assert server.seen == [None]  # what is there is not fetched again


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(mirror, server, tmp_path, monkeypatch, ranges):
    monkeypatch.setattr(Server, "ranges", ranges)
    monkeypatch.setattr(Server, "cut", 20)
    with pytest.raises(UserError, match="closed too early: try again, which goes on"):
        download.download("afqmc", tmp_path / "afqmc", mirror)
    assert files(tmp_path) == ["partial-afqmc_public.zip"]
    monkeypatch.setattr(Server, "cut", None)
    download.download("afqmc", tmp_path / "afqmc", mirror)
    assert server.seen == [None, "bytes=20-"]
    assert files(tmp_path) == ["afqmc", "afqmc/b", "afqmc/train.json"]


def test_files_without_a_folder_around_them(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "content", packed(**{"train.json": "{}", "a/b": ""}))
    monkeypatch.setitem(download.ARCHIVES, "afqmc", download.Archive("afqmc_public.zip"))
    download.download("afqmc", tmp_path / "afqmc", mirror)
    assert files(tmp_path) == ["afqmc", "afqmc/a", "afqmc/a/b", "afqmc/train.json"]


@pytest.mark.parametrize(
    "content",
    [b"no archive", packed(b="1" * 99)[:60], packed()],
    ids=["no archive", "cut off", "empty"],  # the bytes hold the time
)
def test_broken_archives_are_thrown_away(mirror, tmp_path, monkeypatch, content):
    monkeypatch.setattr(Server, "content", content)
    monkeypatch.setitem(download.ARCHIVES, "afqmc", download.Archive("afqmc_public.zip"))
    with pytest.raises(UserError, match="download it by other means"):
        download.download("afqmc", tmp_path / "afqmc", mirror)
    assert files(tmp_path) == []


def test_a_complete_download_that_was_not_unpacked(mirror, tmp_path):
    (tmp_path / "partial-afqmc_public.zip").write_bytes(Server.content)
    download.download("afqmc", tmp_path / "afqmc", mirror)
    assert files(tmp_path) == ["afqmc", "afqmc/b", "afqmc/train.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 5}, r"has \d+ bytes, not 5: download it by other means"),
        ({"sha256": "00"}, "has the SHA-256 .*, not 00"),
    ],
)
def test_what_is_not_as_known_is_thrown_away(mirror, tmp_path, monkeypatch, change, message):
    archive = download.ARCHIVES["afqmc"]._replace(**change)
    monkeypatch.setitem(download.ARCHIVES, "afqmc", archive)
    with pytest.raises(UserError, match=message):
        download.download("afqmc", tmp_path / "afqmc", mirror)
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "C:/evil", "..\\evil"])
def test_files_outside_of_the_archive_are_refused(mirror, tmp_path, monkeypatch, name):
    monkeypatch.setattr(Server, "content", packed(**{"good": "1", name: "2"}))
    monkeypatch.setitem(download.ARCHIVES, "afqmc", download.Archive("afqmc_public.zip"))
    with pytest.raises(UserError, match="has a file outside of itself"):
        download.download("afqmc", tmp_path / "data" / "afqmc", mirror)
    assert files(tmp_path) == ["data"]


def test_no_archive_and_no_server(mirror, tmp_path, capsys):
    command = ["tnews", "--data", str(tmp_path / "tnews"), "--download", "--mirror"]
    for address, reason in ((mirror, "404"), ("http://127.0.0.1:9", "refused")):
        assert run.main([*command, address]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert "tnews_public.zip" in error
        assert "or give a --mirror" in error
        assert error.count("\n") == 1
    assert run.main(["tnews", "--download"]) == 2
    assert "--download needs --data" in capsys.readouterr().err
