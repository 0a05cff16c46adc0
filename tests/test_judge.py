"""The judge: a real server on loopback that is slow, refuses, breaks, and talks nonsense; and the
arithmetic of the table."""

import http.server
import json
import threading
import time

import pytest
from conftest import copies, records, refuses, serving

from common import InputError
from model import RewardModel, load_model, save_model
from real import judge
from real.judge import Config, Judge, summarize, verdict_in
from real.label import wilson


class Handler(http.server.BaseHTTPRequestHandler):
    """Follows server.script, one step a request; then answers what server.answer(question) says."""

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, self.headers.get("Authorization"), body))
            step, *details = server.script.pop(0) if server.script else ("fine",)
        text = server.answer(body["messages"][0]["content"])
        content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        code, headers = 200, {}
        if step == "status":
            code, content, headers = details
        elif step == "slow":
            time.sleep(0.6)
        elif step == "vanish":
            return self.connection.close()
        elif step == "nonsense":
            content = b"<html>not JSON"
        elif step == "no choices":
            content = b'{"choices": []}'
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            self.wfile.write(content[:10] if step == "cut" else content)
        except OSError:
            pass        # the client of a slow answer is gone


@pytest.fixture
def server(monkeypatch):
    for name in ("WORDPLAY_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(Handler, script=[], requests=[], lock=threading.Lock(),
                 answer=lambda question: "1") as server:
        server.url += "/v1"
        yield server


@pytest.fixture
def sources(tmp_path):
    for name, verb in (("a.txt", "rise"), ("b.txt", "fall")):
        lines = [f"I {verb} {i}\n" for i in range(6)]
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    return str(tmp_path / "a.txt"), str(tmp_path / "b.txt")


def make(server, tmp_path, **options):
    return Judge(server.url, "m", tmp_path / "judge.jsonl", wait=0.001, **options)


def status(code, content=b"busy", **headers):
    return "status", code, content, {name.replace("_", "-"): headers[name] for name in headers}


def test_it_asks_again_until_there_is_an_answer(server, tmp_path):
    server.script = [status(429, Retry_After="0"), status(500), status(503), ("vanish",),
                     ("slow",), ("fine",)]
    assert make(server, tmp_path, timeout=0.2).ask("?") == "1"
    server.script += [("cut",), ("nonsense",), ("fine",)]
    assert make(server, tmp_path).ask("?") == "1" and len(server.requests) == 9
    for path, _, body in server.requests:
        assert path == "/v1/chat/completions" and body["messages"][0]["content"] == "?"
        assert body["temperature"] == 0         # the most likely verdict, the same each time


def test_it_gives_up_with_one_sentence(server, tmp_path):
    for script, retries, reason, n_requests in (
            ([status(500)] * 9, 2, "500 Internal Server Error", 3),
            ([("vanish",)] * 9, 1, "closed connection", 2),
            ([("no choices",)] * 9, 5, "no chat completion", 3)):
        server.script, server.requests[:] = script, []
        with pytest.raises(InputError, match=f"gave up: .*{reason}.*are kept") as error:
            make(server, tmp_path, retries=retries).ask("?")
        assert "\n" not in str(error.value) and len(server.requests) == n_requests
    with pytest.raises(InputError, match="gave up: .*refused"):
        Judge("http://127.0.0.1:1/v1", "m", tmp_path / "judge.jsonl", retries=0).ask("?")


@pytest.mark.parametrize("code, reason", [(401, "set WORDPLAY_API_KEY"), (404, "no such model"),
                                          (302, "302")])
def test_a_refusal_is_final_and_a_redirect_is_not_followed(server, tmp_path, monkeypatch, code,
                                                           reason):
    monkeypatch.setenv("WORDPLAY_API_KEY", "sesame")
    server.script = [status(code, b"no such model; your key is sesame",
                            Location=server.url + "/elsewhere")]
    with pytest.raises(InputError, match=reason) as error:
        make(server, tmp_path).ask("?")
    assert len(server.requests) == 1 and "sesame" not in str(error.value)


@pytest.mark.parametrize("text, found", [
    ("1", "1"), (" 2.\n", "2"), ("**2**", "2"), ("=", "="), ("Tie", "="), ("Answer: 1", "1"),
    ("The final answer is: **2**", "2"), ("Text 2", "2"),
    ("<think>1 is flat, 2 is not</think>\n2", "2"), ("1 rhymes.\nSo does 2.\n\nVerdict: =", "="),
    ("", ""), ("3", ""), ("12", ""), ("Both are fun", ""), ("<think>1", ""),
    ("I prefer neither 1 nor 2, honestly", "")])
def test_verdict(text, found):
    assert verdict_in(text) == found


def test_summary_by_hand():
    """Of five pairs a wins one in both orders, ties one, loses half of one, the judge prefers the
    first text in one, and gives no verdict on one."""
    verdicts = [("1", "2"), ("=", "="), ("2", "="), ("1", "1"), ("1", "")]
    row = summarize("a : b", verdicts)
    # Points of a: 1, 1/2, (0 + 1/2) / 2, 1/2. Points of the first: 1 0, 1/2 1/2, 0 1/2, 1 1.
    assert row["win"] == pytest.approx((1 + 0.5 + 0.25 + 0.5) / 4)
    assert (row["pairs"], row["no_verdict"]) == (4, 1) and row["consistent"] == 0.5
    assert row["ties"] == 3 / 8 and row["first"] == pytest.approx(4.5 / 8)
    assert (row["low"], row["high"]) == wilson(row["win"], 4)
    refuses("no verdict on any of 1 pairs", summarize, "a : b", [("1", "")])


def test_a_stopped_run_loses_nothing_and_a_repeated_one_costs_nothing(server, tmp_path):
    server.answer = lambda question: "2" if "good" in question else "1"
    questions = [f"question {i}, {'good' if i % 2 else 'bad'}" for i in range(8)]
    server.script = [("fine",)] * 3 + [status(404)] * 3
    refuses("404", make(server, tmp_path, workers=1).verdicts, questions)
    path = tmp_path / "judge.jsonl"
    assert len(path.read_text().splitlines()) == 3
    with path.open("a") as file:                # killed in the middle of a line
        file.write('{"id": "torn')
    server.script, server.requests[:] = [], []
    again = make(server, tmp_path, workers=3)
    assert again.verdicts(questions) == ["1", "2"] * 4
    assert len(server.requests) == again.n_requests == 5
    assert make(server, tmp_path).verdicts(questions[::-1]) == ["2", "1"] * 4
    assert len(server.requests) == 5
    Judge(server.url, "another", path).verdicts(questions[:1] * 2)      # another model, once
    assert len(server.requests) == 6
    Judge(server.url + "/", "m", path).verdicts(questions[:1])          # perhaps another server
    assert len(server.requests) == 7


def test_nonsense_stays_without_a_verdict(server, tmp_path):
    server.answer = lambda question: "Well..." if "hard" in question else "="
    assert make(server, tmp_path, workers=1).verdicts(["easy", "hard"]) == ["=", ""]
    assert make(server, tmp_path).verdicts(["hard"]) == [""] and len(server.requests) == 2


def test_the_key_comes_from_the_environment_and_is_written_nowhere(server, tmp_path, sources,
                                                                   monkeypatch, capsys):
    netrc = tmp_path / "home" / "netrc"
    netrc.parent.mkdir()
    netrc.write_text("machine 127.0.0.1 login me password netrc-sesame\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for key in (None, "sesame-1", "sesame-2"):
        if key:
            name = "OPENAI_API_KEY" if key == "sesame-1" else "WORDPLAY_API_KEY"
            monkeypatch.setenv(name, key)
        server.requests.clear()
        (tmp_path / "judge.jsonl").unlink(missing_ok=True)
        judge.main(Config(server.url, "m", sources, out_dir=str(tmp_path)))
        expected = f"Bearer {key}" if key else None
        assert {sent for _, sent, _ in server.requests} == {expected}
    out = capsys.readouterr()
    texts = [path.read_text() for path in tmp_path.iterdir() if path.is_file()]
    for text in (out.out, out.err, *texts):
        assert "sesame" not in text


def test_files_in_both_orders(server, tmp_path, sources, capsys):
    """A judge that always likes the rising one, and one that always likes what comes first."""
    server.answer = lambda question: "1" if question.index("rise") < question.index("fall") else "2"
    server.script = [("slow",)]
    row, = judge.main(Config(server.url, "m", sources, out_dir=str(tmp_path), timeout=0.3))
    assert (row["win"], row["first"], row["consistent"], row["pairs"]) == (1, 0.5, 1, 6)
    assert len(server.requests) > 12                # what took too long was asked again
    assert capsys.readouterr().out.splitlines()[1].split()[6:9] == ["0.0", "100.0", "50.0"]
    server.answer = lambda question: "1"
    row, = judge.main(Config(server.url, "m2", sources, out_dir=str(tmp_path), n=4))
    assert (row["win"], row["first"], row["consistent"], row["pairs"]) == (0.5, 1, 0, 4)
    assert " : ".join(sources) in capsys.readouterr().out
    assert json.loads((tmp_path / "judge.json").read_text())[0]["pairs"] == 4


def test_policies_against_the_reference(server, tmp_path, sft_ckpt, tok, capsys):
    copies(tmp_path, sft_ckpt, "sft", "ppo")
    save_model(tmp_path / "reward_model" / "ckpt.pt", RewardModel(load_model(sft_ckpt)), tok)
    data = records(tmp_path / "data.jsonl", [{"prompt": f"On {what}:"} for what in ("jam", "tea")])
    config = Config(server.url, "m", reference=str(tmp_path / "sft" / "ckpt.pt"),
                    out_dir=str(tmp_path), n=5, data=data)
    row, = judge.main(config)
    assert row["policies"] == f"{tmp_path / 'ppo' / 'ckpt.pt'} : {config.reference}"
    assert row["pairs"] == 5 and row["win"] == 0.5
    assert all("to: On " in body["messages"][0]["content"] for *_, body in server.requests)
    capsys.readouterr()
    judge.main(config)          # the same samples: nothing is asked again
    assert len(server.requests) == 10 and "0 requests" in capsys.readouterr().out


def test_bad_input(tmp_path):
    nobody = "http://127.0.0.1:1/v1"
    for url, sources, reason in (("localhost:8000", (), "--url is the address"),
                                 ("http://me:key@host/v1", (), "--url is the address"),
                                 (nobody, ("a.txt",), "--sources names two"),
                                 (nobody, (), "there is no policy in")):
        refuses(reason, judge.main, Config(url, "m", sources, out_dir=str(tmp_path)))
