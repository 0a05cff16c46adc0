"""The judge over HTTP: a real server on loopback that is slow, refuses, breaks and talks nonsense; and the arithmetic of the table."""

import http.server
import json
import threading
import time

import pytest
from conftest import serving

import judge
from common import InputError
from judge import Judge, ask, summarize, verdict, wait_of, wilson


class Handler(http.server.BaseHTTPRequestHandler):
    """Follows server.script, one step a request, then answers what server.answer says of the question."""

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, self.headers.get("Authorization"), body))
            step = server.script.pop(0) if server.script else "fine"
        text = step[1] if isinstance(step, tuple) and step[0] == "say" else server.answer(body["messages"][0]["content"])
        content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        if step == "slow":
            time.sleep(0.6)
        if isinstance(step, tuple) and step[0] == "status":
            self.send_response(step[1])
            for name, value in step[2].items():
                self.send_header(name, value)
            content = step[3]
        elif step == "vanish":
            return self.connection.close()
        elif step == "nonsense":
            content = b"<html>not JSON"
            self.send_response(200)
        elif step == "no choices":
            content = b'{"choices": []}'
            self.send_response(200)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            self.wfile.write(content[:10] if step == "cut" else content)
        except OSError:
            pass        # the client of a slow answer is gone


def status(code, content=b"busy", **headers):
    return "status", code, {name.replace("_", "-"): value for name, value in headers.items()}, content


@pytest.fixture
def server(monkeypatch):
    for name in ("WORDPLAY_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(Handler, script=[], requests=[], lock=threading.Lock(), answer=lambda question: "1") as server:
        server.url += "/v1"
        yield server


BODY = {"model": "m", "messages": [{"role": "user", "content": "?"}]}


def test_it_is_asked_again_until_it_answers(server):
    server.script = [status(429, Retry_After="0"), status(500), status(503), "vanish", "cut", "nonsense", "no choices", "slow", "fine"]
    assert ask(server.url, BODY, timeout=0.2, retries=8, wait=0.001) == "1"
    assert len(server.requests) == 9 and all(path == "/v1/chat/completions" and body == BODY for path, _, body in server.requests)


def test_it_gives_up_with_one_sentence(server):
    server.script = [status(500)] * 9
    with pytest.raises(InputError, match="gave up after 3 attempts, the last one: 500") as error:
        ask(server.url, BODY, retries=2, wait=0)
    assert "\n" not in str(error.value) and len(server.requests) == 3
    with pytest.raises(InputError, match="gave up after 1 attempts, the last one: .*refused"):
        ask("http://127.0.0.1:1/v1", BODY, retries=0)


@pytest.mark.parametrize("code, reason", [(401, "set WORDPLAY_API_KEY"), (404, "no such model"), (302, "302")])
def test_what_cannot_help_is_not_repeated_and_a_redirect_is_not_followed(server, code, reason):
    server.script = [status(code, b"no such model; your key is sesame", Location=server.url + "/elsewhere")]
    with pytest.raises(InputError, match=reason) as error:
        ask(server.url, BODY, key="sesame")
    assert len(server.requests) == 1 and "sesame" not in str(error.value)


def test_how_long_it_waits():
    import email.message
    import urllib.error

    def error(after):
        headers = email.message.Message()
        headers["Retry-After"] = after
        return urllib.error.HTTPError("u", 429, "", headers, None)

    assert wait_of(error("7"), 0, 1) == 7 and wait_of(error("1e9"), 0, 1) == 60 and wait_of(error("nan"), 0, 1) == 60
    assert wait_of(error("Wed, 21 Oct 2015 07:28:00 GMT"), 0, 1) == 0                 # a date that is past
    for attempt in range(4):
        assert 2 ** attempt / 2 <= wait_of(OSError(), attempt, 1) <= 2 ** attempt     # doubles, with some chance
        assert 2 ** attempt / 2 <= wait_of(error("soon"), attempt, 1) <= 2 ** attempt


@pytest.mark.parametrize("text, found", [
    ("1", "1"), (" 2.\n", "2"), ("**2**", "2"), ("=", "="), ("Tie", "="), ("Answer: 1", "1"), ("The final answer is: **2**", "2"), ("Text 2", "2"),
    ("<think>1 is flat, 2 is not</think>\n2", "2"), ("1 rhymes.\nSo does 2.\n\nVerdict: =", "="),
    ("", ""), ("3", ""), ("12", ""), ("Both are fun", ""), ("I prefer neither 1 nor 2, honestly", ""), ("<think>1", "")])
def test_verdict(text, found):
    assert verdict(text) == found


def test_wilson_by_hand():
    # p = .5, n = 100: middle .5; half = 1.96 / (1 + .038416) sqrt(.0025 + 3.8416 / 40000) = 1.88749 * .0509519 = .0961711
    assert wilson(0.5, 100) == pytest.approx((0.5 - 0.0961711, 0.5 + 0.0961711), abs=1e-6)
    low, high = wilson(1.0, 20)
    assert high == pytest.approx(1) and low == pytest.approx(20 / (20 + 3.8416))       # p = 1: 1 / (1 + z^2 / n)


def test_summarize_by_hand():
    # a wins both; a wins shown first and ties; first place wins always; two ties; b wins both; one answer missing
    row = summarize("x", [("1", "2"), ("1", "="), ("1", "1"), ("=", "="), ("2", "1"), ("1", "")])
    assert row["win"] == pytest.approx((1 + 0.75 + 0.5 + 0.5 + 0) / 5) and row["pairs"] == 5 and row["no_verdict"] == 1
    assert row["consistent"] == 3 / 5 and row["ties"] == 3 / 10
    assert row["first"] == pytest.approx((1 + 0 + 1 + .5 + 1 + 1 + .5 + .5 + 0 + 1) / 10)
    with pytest.raises(InputError, match="no verdict on any of 1 pairs"):
        summarize("x", [("1", "")])


def test_a_stopped_run_loses_nothing_and_a_repeated_one_costs_nothing(server, tmp_path):
    server.answer = lambda question: "2" if "good" in question else "1"
    questions = [f"question {i}, {'good' if i % 2 else 'bad'}" for i in range(8)]
    cache = tmp_path / "judge.jsonl"
    server.script = ["fine"] * 3 + [status(400)] * 9
    with pytest.raises(InputError, match="400"):
        Judge(server.url, "m", cache, workers=1).verdicts(questions)
    assert len(cache.read_text().splitlines()) == 3
    with cache.open("a") as file:                              # and killed in the middle of a line
        file.write('{"id": "torn')
    server.script, server.requests[:] = [], []
    again = Judge(server.url, "m", cache, workers=3)
    assert again.verdicts(questions) == ["1", "2"] * 4 and len(server.requests) == again.asked == 5
    assert Judge(server.url, "m", cache).verdicts(questions[::-1]) == ["2", "1"] * 4 and len(server.requests) == 5
    Judge(server.url, "another", cache).verdicts(questions[:1])          # another model is asked anew
    assert len(server.requests) == 6


def test_nonsense_is_asked_again_and_then_left_out(server, tmp_path):
    server.answer = lambda question: "Well..." if "hard" in question else "="
    server.script = [("say", "Hm."), ("say", "2")]
    found = Judge(server.url, "m", tmp_path / "c.jsonl", workers=1).verdicts(["easy", "hard"])
    assert found == ["2", ""] and [body["temperature"] for *_, body in server.requests] == [0.0, 0.7, 0.0, 0.7, 0.7]
    assert Judge(server.url, "m", tmp_path / "c.jsonl").verdicts(["hard"]) == [""] and len(server.requests) == 5


def test_the_key_comes_from_the_environment_and_is_written_nowhere(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame-1")
    monkeypatch.setenv("WORDPLAY_API_KEY", "sesame-2")
    (tmp_path / "a.txt").write_text("Good.\n")
    (tmp_path / "b.txt").write_text("Bad.\n")
    judge.judge(server.url, "m", (str(tmp_path / "a.txt"), str(tmp_path / "b.txt")), out_dir=str(tmp_path))
    assert {key for _, key, _ in server.requests} == {"Bearer sesame-2"}
    out = capsys.readouterr()
    assert all("sesame" not in text for text in (out.out, out.err, *(path.read_text() for path in tmp_path.iterdir())))


def test_files_in_both_orders(server, tmp_path, capsys):
    """A judge that always likes the rising one, and one that always likes what comes first."""
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("".join(f"I rise {i}\n" for i in range(6)))
    b.write_text("".join(f"I fall {i}\n" for i in range(6)))
    server.answer = lambda question: "1" if question.index("rise") < question.index("fall") else "2"
    row, = judge.judge(server.url, "m", (str(a), str(b)), out_dir=str(tmp_path))
    assert (row["win"], row["first"], row["consistent"], row["pairs"]) == (1, .5, 1, 6) and len(server.requests) == 12
    server.answer = lambda question: "1"
    row, = judge.judge(server.url, "m2", (str(a), str(b)), out_dir=str(tmp_path), n=4)
    assert (row["win"], row["first"], row["consistent"], row["pairs"]) == (.5, 1, 0, 4)
    assert "a.txt : b.txt" in capsys.readouterr().out and json.loads((tmp_path / "judge.json").read_text())[0]["pairs"] == 4


def test_policies_against_sft(server, tmp_path, sft_ckpt, capsys):
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "ckpt.pt").write_bytes(open(sft_ckpt, "rb").read())
    rows = judge.judge(server.url, "m", reference=sft_ckpt, out_dir=str(tmp_path), n=5)
    assert rows[0]["policies"] == "ppo : sft" and rows[0]["pairs"] == 5 and rows[0]["win"] == .5
    requests = len(server.requests)
    judge.judge(server.url, "m", reference=sft_ckpt, out_dir=str(tmp_path), n=5)        # the same samples: nothing is asked again
    assert len(server.requests) == requests == 10 and "0 requests" in capsys.readouterr().out


def test_bad_input(tmp_path):
    for options, reason in (({"url": "localhost:8000"}, "--url is the address"), ({"url": "http://me:key@host/v1"}, "--url is the address"),
                            ({"sources": ("a.txt",)}, "--sources names two"), ({}, "no policy's ckpt.pt")):
        with pytest.raises(InputError, match=reason):
            judge.judge(**({"url": "http://127.0.0.1:1/v1", "model": "m", "out_dir": str(tmp_path)} | options))
