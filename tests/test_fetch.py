"""Downloads from a server on loopback: licence, hashes, retries, unpacking."""

import hashlib
import http.server
import io
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT, serving
from test_semeval import write_semeval

from common import InputError
from real import fetch
from real.corpora import load

pytest.importorskip("pooch")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves server.content; cuts the connection half-way as long as server.cuts > 0."""

    def do_GET(self):
        server = self.server
        server.requests += 1
        if server.status != 200:
            self.send_error(server.status)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(server.content)))
        self.end_headers()
        size = len(server.content)
        if server.cuts > 0:
            server.cuts -= 1
            size //= 2
        self.wfile.write(server.content[:size])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)     # between two tries
    content = bytes(range(256)) * 2000
    with serving(Server, content=content, cuts=0, status=200, requests=0) as server:
        server.url += "/data.bin"
        yield server


def hash_of(server):
    return hashlib.sha256(server.content).hexdigest()


def test_download_tries_again_and_keeps_what_is_there(server, tmp_path):
    path = tmp_path / "new" / "data.bin"
    server.cuts = 2
    fetch.download(server.url, path, hash_of(server).upper())
    assert path.read_bytes() == server.content and server.requests == 3
    fetch.download(server.url, path, hash_of(server))
    assert server.requests == 3
    path.write_bytes(b"damaged")
    fetch.download(server.url, path, hash_of(server))
    assert path.read_bytes() == server.content


def test_another_file_is_not_kept(server, tmp_path):
    with pytest.raises(InputError, match="does not match") as error:
        fetch.download(server.url, tmp_path / "data.bin", "0" * 64)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_errors_of_server_network_and_library(server, tmp_path, monkeypatch):
    server.status = 503
    with pytest.raises(InputError, match="503"):
        fetch.download(server.url, tmp_path / "data.bin", "", retries=1)
    assert server.requests == 2 and not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="nothing was kept"):
        fetch.download("http://127.0.0.1:1/data.bin", tmp_path / "data.bin", "", retries=0)
    monkeypatch.setitem(sys.modules, "pooch", None)             # now its import fails
    with pytest.raises(InputError, match="pip install pooch"):
        fetch.download("http://127.0.0.1:1/data.bin", tmp_path / "data.bin", "")


@pytest.fixture
def sources(server, tmp_path, monkeypatch):
    """Makes the server the home of both data sets: semeval with a hash, expun without one."""
    write_semeval(tmp_path / "packed" / "data" / "test")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as tar:
        tar.add(tmp_path / "packed", "semeval2017_task7")
        tar.addfile(tarfile.TarInfo("../../evil.xml"))
        tar.addfile(tarfile.TarInfo("program.py"))
        link = tarfile.TarInfo("link.xml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    server.content = archive.getvalue()
    url = server.url.replace("data.bin", "archive.tar.xz")
    monkeypatch.setattr(fetch, "SOURCES", {
        "semeval": fetch.Source({url: hash_of(server)}, "Licence of it."),
        "expun": fetch.Source({server.url: ""}, "NC.")})
    monkeypatch.setattr("sys.stdin", io.StringIO())             # not a terminal
    return server


def test_the_licence_comes_first(sources, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="--accept_licence"):
        fetch.fetch("semeval", tmp_path / "out")
    assert "Licence of it." in capsys.readouterr().out and sources.requests == 0
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(InputError, match="was not accepted"):
        fetch.fetch("semeval", tmp_path / "out")
    assert sources.requests == 0
    monkeypatch.setattr("builtins.input", lambda question: "y")
    fetch.fetch("semeval", tmp_path / "out")
    assert sources.requests == 1


def test_fetch_unpacks_what_is_wanted_and_nothing_outside(sources, tmp_path):
    out = tmp_path / "out"
    fetch.fetch("semeval", out, accept_licence=True)
    assert len(load(out / "semeval").records) == 5
    assert (out / "semeval" / "LICENCE.txt").read_text(encoding="utf-8") == "Licence of it.\n"
    names = {path.name for path in out.rglob("*")}
    assert not names & {"program.py", "link.xml"}
    assert not (tmp_path / "evil.xml").exists() and not (tmp_path.parent / "evil.xml").exists()


def test_hashes_and_their_options(sources, tmp_path, capsys):
    def fetch_expun(**options):
        fetch.fetch("expun", tmp_path, accept_licence=True, **options)

    with pytest.raises(InputError, match="no hash of expun is known"):
        fetch_expun()
    with pytest.raises(InputError, match="1 files, but --sha256 has 2"):
        fetch_expun(sha256=("a", "b"))
    with pytest.raises(InputError, match="does not match"):
        fetch_expun(sha256=("0" * 64,))
    fetch_expun(verify=False)
    assert f"SHA-256 {hash_of(sources)}, NOT checked" in capsys.readouterr().out
    fetch_expun(sha256=(hash_of(sources),))
    assert "as expected" in capsys.readouterr().out


def test_a_damaged_archive(tmp_path):
    (tmp_path / "archive.tar.xz").write_bytes(b"no archive")
    with pytest.raises(InputError, match="archive.tar.xz: cannot be unpacked"):
        fetch.unpack(tmp_path / "archive.tar.xz", tmp_path)


def test_the_command_exits_with_2_and_one_sentence():
    done = subprocess.run([sys.executable, "-m", "real.fetch", "semeval"], cwd=ROOT, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith("error: nothing was downloaded")
    assert done.stderr.count("\n") == 1 and "CC BY-NC 4.0" in done.stdout
