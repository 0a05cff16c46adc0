"""Downloads from a server on loopback: license, hashes, retries, unpacking."""

import hashlib
import http.server
import io
import sys
import tarfile

import pytest
from conftest import program, refuses, serving
from test_semeval import write_semeval

from real import fetch
from real.corpora import load

pytest.importorskip("pooch")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves server.content; cuts the connection half-way as long as server.cuts > 0."""

    def do_GET(self):
        server = self.server
        server.requests += 1
        if server.status != 200:
            return self.send_error(server.status)
        size = len(server.content)
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if server.cuts > 0:
            server.cuts -= 1
            size //= 2
        self.wfile.write(server.content[:size])


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The home of both data sets: an archive with SemEval's files."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)     # between two tries
    monkeypatch.setattr("sys.stdin", io.StringIO())             # not a terminal
    write_semeval(tmp_path / "packed" / "data" / "test")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as tar:
        tar.add(tmp_path / "packed", "semeval2017_task7")
    with serving(Server, content=archive.getvalue(), cuts=0, status=200, requests=0) as server:
        server.url += "/archive.tar.xz"
        server.sha256 = hashlib.sha256(server.content).hexdigest()
        monkeypatch.setattr(fetch, "SOURCES", {
            "semeval": fetch.Source({server.url: server.sha256}, "License of it."),
            "expun": fetch.Source({server.url.replace(".tar", ""): None}, "NC.")})
        yield server


def test_download_tries_again_and_keeps_what_is_there(server, tmp_path):
    path = tmp_path / "new" / "data.bin"
    server.cuts = 2
    fetch.download(server.url, path, server.sha256)
    assert path.read_bytes() == server.content and server.requests == 3
    fetch.download(server.url, path, server.sha256)
    assert server.requests == 3
    path.write_bytes(b"damaged")
    fetch.download(server.url, path, server.sha256)
    assert path.read_bytes() == server.content


def test_nothing_else_is_kept(server, tmp_path, monkeypatch):
    path = tmp_path / "new" / "data.bin"
    refuses("does not match", fetch.download, server.url, path, "0" * 64)
    server.status = 503
    refuses("nothing was kept: 503", fetch.download, server.url, path, server.sha256)
    refuses("nothing was kept", fetch.download, "http://127.0.0.1:1/data.bin", path, server.sha256)
    assert not list(path.parent.iterdir())
    monkeypatch.setitem(sys.modules, "pooch", None)             # now its import fails
    refuses("pip install pooch", fetch.download, server.url, path, server.sha256)


def test_the_license_comes_first(server, tmp_path, monkeypatch, capsys):
    refuses("--accept_licence", fetch.fetch, "semeval", tmp_path)
    assert "License of it." in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer in ("n", ""):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        refuses("was not accepted", fetch.fetch, "semeval", tmp_path)
    assert server.requests == 0
    monkeypatch.setattr("builtins.input", lambda question: "y")
    fetch.fetch("semeval", tmp_path)
    assert server.requests == 1 and len(load(tmp_path / "semeval").records) == 5
    assert (tmp_path / "semeval" / "LICENCE.txt").read_text(encoding="utf-8") == "License of it.\n"
    fetch.fetch("expun", tmp_path, accept_licence=True)
    assert f"SHA-256 {server.sha256}" in capsys.readouterr().out


def test_every_file_is_pinned():
    """By its SHA-256, or by a git commit in its address: 40 hexadecimal digits."""
    for source in fetch.SOURCES.values():
        for url, sha256 in source.files.items():
            assert sha256 or any(len(part) == 40 for part in url.split("/"))


def test_the_command_exits_with_2_and_one_sentence():
    done = program("real.fetch", "semeval")
    assert done.returncode == 2 and done.stderr.startswith("error: nothing was downloaded")
    assert done.stderr.count("\n") == 1 and "CC BY-NC 4.0" in done.stdout
