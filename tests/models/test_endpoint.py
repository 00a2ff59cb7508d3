"""Asking a model behind an endpoint: a scripted server for faults, a real one that dies."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.server import KEY, completion, echo, free_port, prompts, question

from bpo.models import checkpoint as checkpoints
from bpo.models.endpoint import Endpoint
from bpo.models.generate import Request, decode, encode_batch
from bpo.models.replies import REFUSED, Reply
from bpo.pairs import stage as pairs
from bpo.params import PairGeneration, Refusal
from bpo.study.files import read_lines

SETTINGS = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 6}


def replies(endpoint, *texts, **changes):
    return endpoint.answers(prompts(*texts), seeds=range(len(texts)), **SETTINGS | changes)


def ask(endpoint, *texts, **changes):
    return [r.text for r in replies(endpoint, *texts, **changes)]


def test_messages_settings_seeds_and_key_are_received_as_they_were_given(endpoint, server):
    messages = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "ä \u2028"})
    large = 2**63 - 1
    assert endpoint.answers([messages], seeds=[large], **SETTINGS) == [Reply("echo: ä", "stop")]
    endpoint.check(**SETTINGS)
    (_, headers, body), (_, _, check) = server.seen
    assert body == {"model": "some/model", "messages": list(messages), "temperature": 0.8,
                    "top_p": 0.95, "max_tokens": 6, "seed": large}
    assert headers["Path"] == "/v1/chat/completions"
    assert check | {"messages": 0, "seed": 0} == body | {"messages": 0, "seed": 0}
    assert headers["Authorization"] == f"Bearer {KEY}"
    with pytest.raises(ValueError):
        endpoint.answers(prompts("a", "b"), seeds=[7], **SETTINGS)


@pytest.mark.parametrize("at_once", (1, 3))
def test_as_many_requests_as_allowed_are_under_way_and_answers_keep_their_order(
        endpoint, server, at_once):
    def later_ones_first(number, body):
        time.sleep(0.05 * (4 - number % 4))
        return echo(body)

    server.reply = later_ones_first
    assert ask(replace(endpoint, at_once=at_once), *"abcdefg") == [f"echo: {c}" for c in "abcdefg"]
    assert server.most == at_once and ask(endpoint) == []
    assert {question(b): b["seed"] for _, _, b in server.seen} == dict(zip("abcdefg", range(7)))


@pytest.mark.parametrize("reply, read", (
    (completion(" a b\n"), Reply("a b", "stop")), (completion("  \n"), Reply("", "stop")),
    (completion(None), Reply("", "stop")), (completion("a", "length"), Reply("a", "length")),
    (completion(["a ", "b"]), Reply("a b", "stop")), (completion(3), Reply("", "stop")),
    (completion([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]),
     Reply("a", "stop")),
    (completion([{"type": "output_text", "text": "a"}, {"type": "text", "text": None}]),
     Reply("a", "stop")),
    (completion(None, None, reasoning_content="hm"), Reply("")),
    (completion(None, refusal="I can't."), Reply("I can't.", REFUSED)),
    ((200, {}, {"id": "x", "choices": []}), Reply("")),
    ((200, {}, {"choices": [{"index": 0, "finish_reason": "stop", "message": None}]}),
     Reply("", "stop")),
    ((400, {}, {"error": {"message": "filtered.\nmore"}}), Reply("filtered", None, 400)),
    ((413, {}, b"too long"), Reply("too long", None, 413)),
    ((422, {}, {"detail": [{"msg": "no"}]}), Reply("[{'msg': 'no'}]", None, 422))))
def test_a_reply_is_taken_as_it_came(endpoint, server, reply, read):
    server.reply = lambda number, body: echo(body) if question(body) == "b" else reply
    assert replies(endpoint, *"bab") == [Reply("echo: b", "stop"), read, Reply("echo: b", "stop")]
    assert len(server.seen) == 3


def test_a_server_that_refuses_the_check_is_refused(endpoint, server):
    server.reply = lambda number, body: (400, {}, {"error": {"message": f"no model {KEY}"}})
    with pytest.raises(Refusal, match="model some/model: refused, HTTP 400: no model <key>; "):
        endpoint.check(**SETTINGS)


# --- faults --------------------------------------------------------------------------------------

@pytest.mark.parametrize("fault", (408, 409, 429, 500, 503, None))
def test_faults_that_pass_are_asked_again(endpoint, server, fault):
    server.reply = lambda number, body: echo(body) if number else fault and (fault, {}, {})
    assert ask(endpoint, "a") == ["echo: a"] and len(server.seen) == 2
    server.seen.clear()
    with pytest.raises(Refusal, match=f"HTTP {fault}" if fault else "no usable reply"):
        ask(replace(endpoint, retries=0), "a")
    assert len(server.seen) == 1


def test_a_lasting_fault_names_server_and_model_and_how_far_the_batch_had_come(endpoint, server):
    server.reply = lambda number, body: echo(body) if question(body) in "ab" else (
        503, {}, {"error": {"message": "busy.\nmore"}})
    with pytest.raises(Refusal) as refusal:
        ask(replace(endpoint, at_once=1, retries=1), *"abcde")
    assert str(refusal.value) == (
        f"{server.url}, model some/model: gave up (retries: 1), HTTP 503: busy; 2 of this batch's "
        "5 had been answered, and what was written so far is kept: the same command goes on from "
        "there")
    assert server.questions() == list("abcc")


def test_a_server_that_is_silent_or_gone_is_given_up(endpoint, server):
    server.reply = lambda number, body: server.ended.wait(20)
    with pytest.raises(Refusal, match=r"silent for 0\.3 s; 0 of this batch's 1 had"):
        ask(replace(endpoint, timeout=0.3, retries=1), "a")
    assert len(server.seen) == 2
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(Refusal, match=f"^{url}, model some/model: .*refused.* 0 of this"):
        ask(replace(endpoint, url=url, retries=1), "a")


@pytest.mark.parametrize("reply, seen", (
    ((200, {}, {"error": {"message": "no room"}}), "no room"), ((200, {}, b"[]"), r"\[\]"),
    ((200, {"Content-Type": "text/html"}, b"<html>\nhi"), "<html>"), ((200, {}, b"{"), "Expect")))
def test_what_is_no_completion_is_not_taken_for_an_answer(endpoint, server, reply, seen):
    server.reply = lambda number, body: reply
    with pytest.raises(Refusal, match=f"{seen}.*; 0 of this"):
        ask(endpoint, "a")


@pytest.mark.parametrize("status, wrapped", (
    (402, lambda t: {"error": {"message": t}}), (401, lambda t: {"detail": t}),
    (403, lambda t: {"error": t}), (404, lambda t: t.encode())))
def test_a_refused_request_is_not_repeated_and_the_key_is_not_shown(
        endpoint, server, caplog, status, wrapped):
    caplog.set_level(logging.DEBUG)
    server.reply = lambda number, body: (status, {}, wrapped(f"not with {'x' * 280}{KEY}!\nmore"))
    with pytest.raises(Refusal, match=f"HTTP {status}: not with x") as refusal:
        ask(endpoint, *"abcdefghi")
    assert "gave up" not in str(refusal.value) and "more" not in str(refusal.value)
    assert len(server.seen) <= endpoint.at_once
    shown = "".join(traceback.format_exception(refusal.value)) + caplog.text + repr(endpoint)
    assert KEY[:8] not in shown
    assert ("TEST_KEY" in str(refusal.value)) == (status in (401, 403))


# --- what came is kept ---------------------------------------------------------------------------

@pytest.mark.parametrize("fault", ((401, {}, {"error": "no"}), (500, {}, b""), (200, {}, b"[]")))
def test_a_failure_waits_for_what_is_under_way_and_starts_nothing_new(endpoint, server, fault):
    def second_fails(number, body):
        while len(server.seen) < 3:
            time.sleep(0.01)
        if question(body) == "b":
            return fault
        time.sleep(0.3)
        return echo(body)

    server.reply, kept = second_fails, {}
    with pytest.raises(Refusal) as refusal:
        ask(replace(endpoint, at_once=3, retries=0), *"abcdef", keep=kept.__setitem__)
    assert {n: r.text for n, r in kept.items()} == {0: "echo: a", 2: "echo: c"}
    assert sorted(server.questions()) == list("abc")
    assert ("gave up" in str(refusal.value)) == (fault[0] != 401)


@pytest.fixture
def interruptible():
    """SIGINT interrupts, also where a shell's `&` had started the tests, which then ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_each_answer_is_handed_over_as_it_comes_and_an_interrupt_loses_none(
        endpoint, server, interruptible):
    def last_hangs(number, body):
        if question(body) == "d":
            assert handed.wait(60)
            os.kill(os.getpid(), signal.SIGINT)
            interrupted.wait(60)
        return echo(body)

    def keep(place, reply):
        kept[place] = reply.text
        if len(kept) == 3:
            handed.set()

    server.reply, kept = last_hangs, {}
    handed, interrupted = threading.Event(), threading.Event()
    with pytest.raises(KeyboardInterrupt):
        ask(replace(endpoint, timeout=90), *"dabc", keep=keep)
    # An interrupt that waited for the hanging request would have its answer too.
    assert kept == {1: "echo: a", 2: "echo: b", 3: "echo: c"}
    interrupted.set()


def test_an_answer_that_cannot_be_kept_ends_it(endpoint, server):
    def full(place, text):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        ask(replace(endpoint, at_once=1), *"abc", keep=full)
    assert len(server.seen) == 1


# --- addresses and keys --------------------------------------------------------------------------

def test_this_machine_s_own_server_is_asked_without_proxy_and_without_key(
        endpoint, server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("TEST_KEY", " \n")
    assert ask(endpoint, "a") == ["echo: a"]
    assert server.seen[0][1]["Authorization"] == "Bearer none"
    for url in ("https://models.invalid/v1", "http://0.0.0.0:1/v1", "http://localhost.invalid/v1"):
        with pytest.raises(Refusal, match=f"^{url}: no key: .* variable TEST_KEY$"):
            replace(endpoint, url=url).check(**SETTINGS)


@pytest.mark.parametrize("key", (f"{KEY} {KEY}", f"{KEY}\n{KEY}", f"{KEY}ä"))
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(endpoint, monkeypatch, key):
    monkeypatch.setenv("TEST_KEY", key)
    with pytest.raises(Refusal, match="no key: .* variable TEST_KEY$") as refusal:
        endpoint.check(**SETTINGS)
    assert KEY not in str(refusal.value)


@pytest.mark.parametrize("url", (
    "models.invalid/v1", "ftp://models.invalid", "http://[::1/v1", "http://h:port/v1",
    f"http://me:{KEY}@127.0.0.1/v1", f"http://127.0.0.1/v1?key={KEY}"))
def test_an_address_that_cannot_be_or_holds_a_secret_is_refused(endpoint, url):
    with pytest.raises(Refusal, match="must look like .* variable TEST_KEY") as refusal:
        replace(endpoint, url=url)
    assert KEY not in str(refusal.value)


# --- a real model behind `transformers serve` ----------------------------------------------------

class Served:
    """A checkpoint folder behind `transformers serve`, on the same port each time it is started."""

    def __init__(self, model: Path, log: Path):
        self.model, self.log, self.port, self.process = model, log, free_port(), None
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Starts it unless it runs."""
        if self.process is not None and self.process.poll() is None:
            return
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("transformers"), "serve", self.model, "--device",
                 "cpu", "--host", "127.0.0.1", "--port", str(self.port)], stdout=log,
                stderr=subprocess.STDOUT)
        ends = time.monotonic() + 90
        while time.monotonic() < ends and self.process.poll() is None:
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                    f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def posted(self) -> int:
        return self.log.read_text().count("POST /v1/chat/completions")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def served(text_folder, tmp_path_factory):
    server = Served(text_folder, tmp_path_factory.mktemp("served") / "log.txt")
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.mark.slow
def test_a_served_model_says_what_it_says_at_home(served, text_folder):
    questions = ("what is this ?", "describe the big cat", "yes", "no red green", "a big hot dog")
    client = Endpoint(served.url, str(text_folder), "UNSET_KEY", at_once=2, retries=1, timeout=60)
    checkpoint = checkpoints.load_text_model(text_folder)
    served.start()
    for text, answer in zip(questions, ask(client, *questions, temperature=0.0), strict=True):
        inputs = encode_batch(checkpoint, [Request("x", prompts(text)[0], None)])
        assert decode(checkpoint, inputs, max_new_tokens=6) == [answer]
    with pytest.raises(Refusal, match="model other: refused, HTTP 400: "):
        replace(client, model="other").check(**SETTINGS)


@pytest.mark.slow
def test_pairs_go_on_when_the_server_that_injects_errors_dies_and_comes_back(
        served, model_folder, data_file, prompt_files, outputs, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    p = PairGeneration(
        study="s", model=str(model_folder), data=str(data_file), sources=["injected"],
        score_candidates=False, endpoint=served.url, endpoint_model=str(served.model),
        endpoint_key_variable="SOME_KEY", endpoint_requests=1, endpoint_retries=0,
        max_new_tokens=6, **prompt_files)
    asked, right = [], Endpoint.answers
    served.start()
    before = served.posted()

    def watched(self, prompts, **settings):
        asked.append(len(prompts))
        if sum(asked) > 6:
            served.kill()  # the check and two batches of four: the second finds nobody
        return right(self, prompts, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Endpoint, "answers", watched)
        with pytest.raises(Refusal, match="0 of this batch's 4"):
            pairs.run(p)
    shard, = (outputs / "s" / "2_pair_generation" / "shards").iterdir()
    assert len(shard.read_text().splitlines()) == 4
    assert served.posted() - before == 1 + 4

    served.start()
    result = pairs.run(p)
    assert served.posted() - before == 1 + 4 + 1 + 8
    made = read_lines(result.folder / "candidates.jsonl")
    assert [c["mode"] for line in made for c in line["candidates"]] == ["endpoint"] * 12
    everything = b"".join(f.read_bytes() for f in outputs.rglob("*") if f.is_file())
    assert b"SOME_KEY" in everything and KEY.encode() not in everything
