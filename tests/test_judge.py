"""Asking a judge and keeping its replies: nothing paid for is lost, nothing is paid for twice."""

import hashlib
import json
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_endpoint import (  # noqa: F401 (fixtures)
    POSTED,
    completion,
    endpoint,
    free_port,
    prompts,
    served,
    server,
)
from test_judged import write

from bpo import judge, runs
from bpo.endpoint import Endpoint, NoAnswer
from bpo.judge import Settings
from bpo.judged import JUDGED, MM_VET
from bpo.params import Refusal

ONE = Settings(temperature=0.2, repeats=1, attempts=1, max_new_tokens=7)
SCORES = {"a": "Score: 0.5", "b": "1.0", "c": "0.0", "d": "0.25", "e": "0.75",
          "f": "Score: 0.5, \u2028 nearly. ä"}


def question(body):
    return body["messages"][-1]["content"]


def scored(number, body):
    return completion({"role": "assistant", "content": SCORES[question(body)]})


def says(*texts):
    """A server's replies one after another, whatever is asked."""
    left = iter(texts)
    return lambda number, body: completion({"role": "assistant", "content": next(left)})


def ask(endpoint, folder, *texts, settings=ONE):  # noqa: F811
    return judge.ask(endpoint, folder, prompts(*texts), MM_VET.parse, settings)


@pytest.fixture(autouse=True)
def scores_by_question(request):
    if "server" in request.fixturenames:
        request.getfixturevalue("server").reply = scored


# --- what is asked, and what comes of it ---------------------------------------------------------

def test_verdicts_come_in_the_order_of_the_prompts(endpoint, server, tmp_path):  # noqa: F811
    found = ask(endpoint, tmp_path / "new" / "folder", *"dab")
    assert [v.scores for v in found] == [((0.25,),), ((0.5,),), ((1.0,),)]
    assert [v.replies for v in found] == [("0.25",), ("Score: 0.5",), ("1.0",)]
    assert not any(v.unscored for v in found)
    body = server.seen[0][2]
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["model"]) == (
        0.2, 1.0, 7, "some/model")
    assert len({b["seed"] for _, _, b in server.seen}) == 3
    assert all(0 <= b["seed"] < 2**31 for _, _, b in server.seen)


def test_a_rerun_asks_nobody_and_needs_no_server_and_no_key(
        endpoint, server, tmp_path, monkeypatch):  # noqa: F811
    settings = replace(ONE, repeats=2, attempts=2)
    server.reply = lambda number, body: completion({"content": "0.5" if number % 2 else "hm"})
    first = ask(endpoint, tmp_path, *"abc", settings=settings)
    asked = len(server.seen)
    assert asked > 6
    monkeypatch.delenv("TEST_KEY")
    gone = replace(endpoint, url="https://models.invalid/v1", retries=0)
    assert ask(gone, tmp_path, *"abc", settings=settings) == first
    assert len(server.seen) == asked
    with pytest.raises(Refusal, match="no key"):
        ask(gone, tmp_path, *"abcd", settings=settings)


@pytest.mark.parametrize("changes, again", (
    ({"temperature": 0.3}, 1), ({"max_new_tokens": 8}, 1), ({"repeats": 2}, 1),
    ({"attempts": 3}, 0), ({"temperature": 0.2}, 0)))
def test_a_reply_belongs_to_the_settings_it_was_asked_with(
        endpoint, server, tmp_path, changes, again):  # noqa: F811
    ask(endpoint, tmp_path, "a")
    ask(endpoint, tmp_path, "a", settings=replace(ONE, **changes))
    assert len(server.seen) == 1 + again


def test_a_reply_belongs_to_its_model_and_its_whole_prompt(
        endpoint, server, tmp_path):  # noqa: F811
    ask(endpoint, tmp_path, "a")
    ask(replace(endpoint, at_once=1, retries=0, timeout=5), tmp_path, "a")
    assert len(server.seen) == 1
    ask(replace(endpoint, model="other"), tmp_path, "a")
    assert len(server.seen) == 2
    judge.ask(endpoint, tmp_path, [({"role": "system", "content": "be strict"}, *prompts("a")[0])],
              MM_VET.parse, ONE)
    assert len(server.seen) == 3


def test_whole_numbers_of_temperature_are_no_other_setting(
        endpoint, server, tmp_path):  # noqa: F811
    for temperature in (0, 0.0):
        ask(endpoint, tmp_path, "a", settings=replace(ONE, temperature=temperature))
    assert len(server.seen) == 1


def test_what_is_asked_twice_is_paid_for_once(endpoint, server, tmp_path):  # noqa: F811
    found = ask(endpoint, tmp_path, *"abaab", settings=replace(ONE, repeats=2))
    assert Counter(server.questions()) == {"a": 2, "b": 2}
    assert [v.scores for v in found] == [((s,),) * 2 for s in (0.5, 1, 0.5, 0.5, 1)]


def test_each_repeat_is_a_reply_of_its_own_with_a_seed_of_its_own(
        endpoint, server, tmp_path):  # noqa: F811
    server.reply = says("0.5", "1.0", "0.0")
    verdict, = ask(replace(endpoint, at_once=1), tmp_path, "a", settings=replace(ONE, repeats=3))
    assert verdict.scores == ((0.5,), (1.0,), (0.0,))
    assert len({body["seed"] for _, _, body in server.seen}) == 3


def test_what_cannot_be_read_is_asked_again_and_then_is_unscored_and_not_0(
        endpoint, server, tmp_path):  # noqa: F811
    def stubborn(number, body):
        return scored(number, body) if question(body) == "a" else says("I like it.")(number, body)

    server.reply = stubborn
    right, none = ask(endpoint, tmp_path, *"ab", settings=replace(ONE, attempts=3))
    assert right.scores == ((0.5,),) and not right.unscored
    assert none.scores == () and none.replies == ("I like it.",) and none.unscored
    assert Counter(server.questions()) == {"a": 1, "b": 3}
    assert len({b["seed"] for _, _, b in server.seen if question(b) == "b"}) == 3


def test_another_attempt_may_be_read(endpoint, server, tmp_path):  # noqa: F811
    server.reply = says("", "hm", "0.0", "0.75")
    settings = replace(ONE, repeats=2, attempts=2)
    verdict, = ask(replace(endpoint, at_once=1), tmp_path, "a", settings=settings)
    assert verdict.scores == ((0.0,), (0.75,)) and verdict.replies == ("0.0", "0.75")
    assert not verdict.unscored and len(server.seen) == 4


def test_a_repeat_that_cannot_be_read_leaves_the_others(endpoint, server, tmp_path):  # noqa: F811
    server.reply = says("hm", "0.5", "hm again")
    settings = replace(ONE, repeats=2, attempts=2)
    verdict, = ask(replace(endpoint, at_once=1), tmp_path, "a", settings=settings)
    assert verdict.scores == ((0.5,),) and verdict.replies == ("hm again", "0.5")
    assert not verdict.unscored


def test_a_better_reader_reads_old_replies_for_nothing(endpoint, server, tmp_path):  # noqa: F811
    server.reply = says("half")
    assert ask(endpoint, tmp_path, "a")[0].unscored
    found = judge.ask(endpoint, tmp_path, prompts("a"), {"half": (0.5,)}.get, ONE)
    assert found[0].scores == ((0.5,),) and len(server.seen) == 1


def test_what_stands_beside_a_number(endpoint, tmp_path):  # noqa: F811
    template = tmp_path / "judge.txt"
    template.write_bytes(b"{question}\r\n")
    assert judge.describe(endpoint, template, ONE) == {
        "judge": "some/model", "prompt": "judge.txt", "temperature": 0.2, "top_p": 1.0,
        "repeats": 1, "attempts": 1, "max_new_tokens": 7,
        "prompt_sha256": hashlib.sha256(b"{question}\r\n").hexdigest()}


@pytest.mark.parametrize("changes", ({"temperature": -0.1}, {"repeats": 0}, {"attempts": 0},
                                     {"max_new_tokens": 0}))
def test_settings_that_cannot_be_are_refused(changes):
    with pytest.raises(Refusal, match="a judge's temperature must be 0 or more"):
        replace(ONE, **changes)


# --- what kills leave ----------------------------------------------------------------------------

def test_a_failure_keeps_what_came_and_the_rest_alone_is_asked_later(
        endpoint, server, tmp_path):  # noqa: F811
    def busy(number, body):
        if question(body) == "b":
            return 503, {}, {"error": "busy"}
        time.sleep(0.3)  # under way while b fails
        return scored(number, body)

    server.reply = busy
    with pytest.raises(NoAnswer, match="HTTP 503: busy; 2 of this batch's 5 had been answered"):
        ask(replace(endpoint, at_once=3, retries=0), tmp_path, *"abcde")
    assert sorted(server.questions()) == list("abc")
    server.reply = scored
    found = ask(endpoint, tmp_path, *"abcde")
    assert [v.replies[0] for v in found] == [SCORES[t] for t in "abcde"]
    assert sorted(server.questions()[3:]) == list("bde")


def test_a_last_line_torn_anywhere_is_mended_and_asked_again_alone(
        endpoint, server, tmp_path):  # noqa: F811
    alone = replace(endpoint, at_once=1)
    expected = ask(alone, tmp_path, *"abf")
    file = tmp_path / judge.REPLIES
    whole = file.read_bytes()
    begin, letter = whole[:-1].rindex(b"\n") + 1, whole.rindex("ä".encode())
    for cut in (begin, begin + 1, begin + 40, letter + 1, len(whole) - 3, len(whole) - 1):
        file.write_bytes(whole[:cut])
        server.seen.clear()
        assert ask(alone, tmp_path, *"abf") == expected
        assert server.questions() == ["f"] and file.read_bytes() == whole


def test_each_reply_is_on_the_disk_before_the_next_is_asked_for(
        endpoint, server, tmp_path, monkeypatch):  # noqa: F811
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda n: synced.append(os.fstat(n).st_size) or fsync(n))
    sizes = []

    def look(number, body):
        file = tmp_path / judge.REPLIES
        sizes.append(file.stat().st_size)
        return scored(number, body)

    server.reply = look
    ask(replace(endpoint, at_once=1), tmp_path, *"abc")
    assert sizes[0] == 0 and synced[:2] == sizes[1:] and sizes[1] < sizes[2] < synced[2]


@pytest.mark.parametrize("line", (b"{}", b"not JSON", b"[1]", b'{"key": "x"}', b"\xff"))
def test_a_damaged_line_is_told_with_its_number(endpoint, tmp_path, line):  # noqa: F811
    ask(endpoint, tmp_path, *"ab")
    file = tmp_path / judge.REPLIES
    first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + line + b"\n" + second)
    with pytest.raises(Refusal, match=r"replies\.jsonl, line 2: is no reply"):
        ask(endpoint, tmp_path, *"ab")


def test_two_processes_do_not_pay_for_the_same(endpoint, server, tmp_path,
                                               monkeypatch):  # noqa: F811
    monkeypatch.setattr(runs, "LOCK_PATIENCE", 0)
    asked, go = threading.Event(), threading.Event()

    def slow(number, body):
        asked.set()
        go.wait(10)
        return scored(number, body)

    server.reply = slow
    other = threading.Thread(target=ask, args=(endpoint, tmp_path, "a"))
    other.start()
    assert asked.wait(10)
    with pytest.raises(Refusal, match="another process asks a judge"):
        ask(endpoint, tmp_path, "a")
    go.set()
    other.join()
    assert ask(endpoint, tmp_path, "a")[0].scores == ((0.5,),) and len(server.seen) == 1


class Paid:
    """A judge in a process of its own, on the same port each time it is started. It writes down
    each question that it has answered, and each that it holds back."""

    def __init__(self, folder):
        self.port, self.child = free_port(), None
        self.answered, self.held = folder / "answered", folder / "held"
        self.answered.touch()
        self.held.touch()

    def endpoint(self, at_once):
        return Endpoint(f"http://127.0.0.1:{self.port}/v1", "judge", "UNSET_KEY", at_once=at_once,
                        retries=0, timeout=20)

    def start(self, *, dies_after=10**6, holds_after=10**6):
        listening = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler(
            dies_after, holds_after))
        self.child = os.fork()
        if self.child == 0:
            try:
                listening.serve_forever()
            finally:
                os._exit(1)
        listening.socket.close()

    def _handler(self, dies_after, holds_after):
        lock, done = threading.Lock(), []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:  # an answer is sent and written down, and nothing between
                    if len(done) >= dies_after:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if len(done) >= holds_after:
                        note(self.held, body)
                    else:
                        done.append(body)
                        _, _, content = scored(len(done), body)
                        content = json.dumps(content).encode()
                        handler.send_response(200)
                        handler.send_header("Content-Type", "application/json")
                        handler.send_header("Content-Length", str(len(content)))
                        handler.end_headers()
                        handler.wfile.write(content)
                        note(self.answered, body)
                        return
                time.sleep(60)

            def log_message(handler, *_):
                pass

        def note(file, body):
            with file.open("a") as stream:
                stream.write(f"{question(body)}{body['seed']}\n")

        return Handler

    def kill(self):
        if self.child is not None:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
            self.child = None


@pytest.fixture
def paid(tmp_path):
    judging = Paid(tmp_path)
    yield judging
    judging.kill()


def lines(file):
    return file.read_text().splitlines()


@pytest.mark.parametrize("at_once", (1, 4))
def test_a_server_killed_midway_and_started_again_is_paid_once_for_each_reply(
        paid, tmp_path, at_once):
    settings, client = replace(ONE, repeats=3), paid.endpoint(at_once)
    paid.start(dies_after=7)
    with pytest.raises(NoAnswer, match="; 7 of this batch's 15 had been answered"):
        ask(client, tmp_path / "kept", *"abcde", settings=settings)
    assert len(lines(paid.answered)) == len(lines(tmp_path / "kept" / judge.REPLIES)) == 7
    with pytest.raises(NoAnswer, match="; 0 of this batch's 8"):
        ask(client, tmp_path / "kept", *"abcde", settings=settings)
    paid.kill()
    paid.start()
    found = ask(client, tmp_path / "kept", *"abcde", settings=settings)
    assert [v.scores for v in found] == [((s,),) * 3 for s in (0.5, 1, 0, 0.25, 0.75)]
    assert len(lines(paid.answered)) == len(set(lines(paid.answered))) == 15


@pytest.mark.parametrize("at_once", (1, 3))
def test_a_killed_process_goes_on_and_has_paid_once_for_each_reply(paid, tmp_path, at_once):
    settings, client = replace(ONE, repeats=2), paid.endpoint(at_once)
    paid.start(holds_after=4)
    child = os.fork()
    if child == 0:
        try:
            ask(client, tmp_path / "kept", *"abcde", settings=settings)
        finally:
            os._exit(1)
    ends = time.monotonic() + 30
    # Each worker asks on when it has kept a reply: then all four are kept.
    while len(lines(paid.held)) < at_once and time.monotonic() < ends:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    paid.kill()
    assert len(lines(paid.answered)) == len(lines(tmp_path / "kept" / judge.REPLIES)) == 4
    paid.start()
    found = ask(client, tmp_path / "kept", *"abcde", settings=settings)
    assert [v.scores for v in found] == [((s,),) * 2 for s in (0.5, 1, 0, 0.25, 0.75)]
    assert len(lines(paid.answered)) == len(set(lines(paid.answered))) == 10


# --- a real model behind `transformers serve` ----------------------------------------------------

@pytest.mark.slow
def test_a_model_that_says_no_score_leaves_all_unscored_and_nothing_0(
        served, tmp_path):  # noqa: F811
    client = Endpoint(f"http://127.0.0.1:{served.port}/v1", str(served.model), "UNSET_KEY",
                      at_once=2, retries=1, timeout=60)
    settings = Settings(temperature=0.7, repeats=1, attempts=2, max_new_tokens=6)
    log = served.start()
    folder = write(tmp_path)
    for benchmark in JUDGED.values():
        before = log.read_text().count(POSTED)
        questions = benchmark.load(folder)
        asked = [benchmark.prompt(q, "a red box") for q in questions]
        verdicts = judge.ask(client, tmp_path / "kept", asked, benchmark.parse, settings)
        assert log.read_text().count(POSTED) - before == 2 * len(questions)
        assert all(v.unscored and len(v.replies) == 1 for v in verdicts)
        assert any(v.replies[0] for v in verdicts)
        for q, v in zip(questions, verdicts, strict=True):
            assert benchmark.counts(q, v.scores) == {"unscored": (1, 1)}
        again = judge.ask(client, tmp_path / "kept", asked, benchmark.parse, settings)
        assert again == verdicts and log.read_text().count(POSTED) - before == 2 * len(questions)
