"""Asking a model behind an endpoint: a scripted server for faults, a real one that dies."""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bpo import pairs, records
from bpo.endpoint import Endpoint, NoAnswer
from bpo.params import PairGeneration, Refusal

POSTED = "POST /v1/chat/completions"
KEY = "sk-very-secret-0123456789"
SETTINGS = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 6}


def prompts(*texts):
    return [({"role": "user", "content": t},) for t in texts]


def ask(endpoint, *texts, **changes):
    return endpoint.answers(prompts(*texts), seeds=range(len(texts)), **SETTINGS | changes)


# --- faults, from a server that does as it is told ----------------------------------------------

class Scripted(ThreadingHTTPServer):
    """Answers "echo: <question>", or what `reply` returns for a request's number and body:
    (status, headers, body), or None for a connection closed without a word."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.seen, self.paths, self.under_way, self.most = [], set(), 0, 0
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.reply = lambda number, body: echo(body)

    def handle_error(self, *_):
        pass  # a client that has given up

    def times(self):
        return [at for at, _, _ in self.seen]

    def questions(self):
        return [body["messages"][-1]["content"] for _, _, body in self.seen]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.seen)
            server.seen.append((time.monotonic(), self.headers, body))
            server.paths.add(self.path)
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        try:
            reply = server.reply(number, body)
        finally:
            with server.lock:
                server.under_way -= 1
        if reply is None:
            self.close_connection = True
            return
        status, headers, content = reply
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json"} | headers
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def completion(message):
    return 200, {}, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices":
                     [{"index": 0, "finish_reason": "length", "message": message}]}


def echo(body):
    return completion({"role": "assistant", "content": f"echo: {body['messages'][-1]['content']}"})


@pytest.fixture
def server():
    with Scripted() as scripted:
        threading.Thread(target=scripted.serve_forever, args=(0.02,), daemon=True).start()
        yield scripted
        scripted.ended.set()
        scripted.shutdown()


@pytest.fixture
def endpoint(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    return Endpoint(server.url, "some/model", "TEST_KEY", at_once=4, retries=2, timeout=10)


def test_messages_settings_seeds_and_key_are_received_as_they_were_given(endpoint, server):
    messages = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "ä \u2028"})
    large = 2**63 - 1
    found = endpoint.answers([messages], seeds=[large], **SETTINGS)
    assert found == ["echo: ä"]
    (_, headers, body), = server.seen
    assert body == {"model": "some/model", "messages": list(messages), "temperature": 0.8,
                    "top_p": 0.95, "max_tokens": 6, "seed": large}
    assert server.paths == {"/v1/chat/completions"}
    assert headers["Authorization"] == f"Bearer {KEY}"


def test_each_prompt_goes_with_its_own_seed_and_none_may_lack_one(endpoint, server):
    endpoint.answers(prompts("a", "b", "c"), seeds=[7, 8, 9], **SETTINGS)
    assert {b["messages"][0]["content"]: b["seed"] for _, _, b in server.seen} == {
        "a": 7, "b": 8, "c": 9}
    with pytest.raises(ValueError):
        endpoint.answers(prompts("a", "b"), seeds=[7], **SETTINGS)


@pytest.mark.parametrize("at_once", (1, 3))
def test_as_many_requests_as_allowed_are_under_way_and_no_more(endpoint, server, at_once):
    def slow(number, body):
        time.sleep(0.1)
        return echo(body)

    server.reply = slow
    ask(replace(endpoint, at_once=at_once), *"abcdefg")
    assert server.most == at_once


def test_answers_keep_the_order_of_their_prompts_when_they_come_in_another(endpoint, server):
    def later_ones_first(number, body):
        time.sleep(0.05 * (4 - number % 4))
        return echo(body)

    server.reply = later_ones_first
    assert ask(endpoint, *"abcdefgh") == [f"echo: {c}" for c in "abcdefgh"]
    assert ask(endpoint) == []


@pytest.mark.parametrize("message, text", (
    ({"role": "assistant", "content": None}, ""), ({"role": "assistant"}, ""),
    ({"role": "assistant", "content": "  \n"}, ""), ({"content": " a b\n"}, "a b")))
def test_an_answer_without_content_is_empty_and_one_is_stripped(endpoint, server, message, text):
    server.reply = lambda number, body: completion(message)
    assert ask(endpoint, "a") == [text]


def test_it_waits_as_long_as_retry_after_says_up_to_two_minutes(endpoint, server):
    server.reply = lambda number, body: echo(body) if number else (429, {"Retry-After": "1.5"}, {})
    assert ask(endpoint, "a") == ["echo: a"]
    first, second = server.times()
    assert 1.5 <= second - first < 4
    server.reply = lambda number, body: (429, {"Retry-After": "121"}, {"detail": "come tomorrow"})
    with pytest.raises(NoAnswer, match="HTTP 429: come tomorrow; 0 of"):
        ask(endpoint, "a")
    assert len(server.seen) == 3


@pytest.mark.parametrize("fault", (408, 409, 429, 500, 503, None))
def test_faults_that_pass_are_asked_again(endpoint, server, fault):
    server.reply = lambda number, body: echo(body) if number else fault and (fault, {}, {})
    assert ask(endpoint, "a") == ["echo: a"]
    assert len(server.seen) == 2
    server.seen.clear()
    with pytest.raises(NoAnswer, match=f"HTTP {fault}" if fault else "no usable reply"):
        ask(replace(endpoint, retries=0), "a")
    assert len(server.seen) == 1


def test_each_wait_is_longer_than_the_one_before(endpoint, server):
    server.reply = lambda number, body: echo(body) if number > 1 else (500, {}, b"oh")
    assert ask(endpoint, "a") == ["echo: a"]
    first, second, third = server.times()
    assert second - first >= 0.37 and third - second >= 0.74


def test_what_lasts_is_told_with_how_far_the_batch_had_come(endpoint, server):
    def busy(number, body):
        return echo(body) if body["messages"][0]["content"] in "ab" else (
            503, {}, {"error": {"message": "busy.\nmore"}})

    server.reply = busy
    with pytest.raises(NoAnswer) as refusal:
        ask(replace(endpoint, at_once=1, retries=1), *"abcde")
    assert str(refusal.value) == (
        f"{server.url}, model some/model: gave up (retries: 1), HTTP 503: busy; 2 of this batch's "
        "5 had been answered, and what was written so far is kept: the same command goes on from "
        "there")
    assert server.questions() == list("abcc")


def test_a_silent_server_is_given_up(endpoint, server):
    server.reply = lambda number, body: server.ended.wait(20)
    began = time.monotonic()
    with pytest.raises(NoAnswer, match=r"silent for 0\.3 s; 0 of this batch's 1 had"):
        ask(replace(endpoint, timeout=0.3, retries=1), "a")
    assert len(server.seen) == 2 and time.monotonic() - began < 5


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_an_endpoint_where_nobody_listens_is_given_up(endpoint):
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(NoAnswer, match=f"^{url}, model some/model: .*connection.* 0 of this"):
        ask(replace(endpoint, url=url, retries=1), "a")


@pytest.mark.parametrize("reply, seen", (
    ((200, {}, {"error": {"message": "no room"}}), "no room"),
    ((200, {"Content-Type": "text/html"}, b"<html>\nhi"), "<html>"),
    ((200, {}, b"{"), "Expecting")))
def test_what_is_no_completion_is_not_taken_for_an_answer(endpoint, server, reply, seen):
    server.reply = lambda number, body: reply
    with pytest.raises(NoAnswer, match=f"{seen}.*; 0 of this"):
        ask(endpoint, "a")


@pytest.mark.parametrize("status", (400, 401, 403, 404, 422))
@pytest.mark.parametrize("wrapped", (
    lambda t: {"error": {"message": t}}, lambda t: {"detail": t}, lambda t: {"error": t},
    lambda t: t.encode()))
def test_a_refused_request_is_not_repeated_and_the_key_is_not_shown(
        endpoint, server, caplog, status, wrapped):
    caplog.set_level(logging.DEBUG)
    server.reply = lambda number, body: (status, {}, wrapped(f"not with {'x' * 280}{KEY}!\nmore"))
    for request in (lambda: ask(endpoint, *"abcdefghi"), endpoint.check):
        server.seen.clear()
        with pytest.raises(Refusal, match=f"HTTP {status}: not with x") as refusal:
            request()
        assert not isinstance(refusal.value, NoAnswer)
        assert "more" not in str(refusal.value)
        assert len(server.seen) <= endpoint.at_once
        shown = "".join(traceback.format_exception(refusal.value)) + caplog.text + repr(endpoint)
        assert KEY[:8] not in shown
    assert ("TEST_KEY" in str(refusal.value)) == (status in (401, 403))


def test_the_first_failure_ends_what_is_under_way_and_starts_nothing_new(endpoint, server):
    def first_hangs(number, body):
        if body["messages"][0]["content"] == "a":
            server.ended.wait(20)
        time.sleep(0.2)
        return 401, {}, {"error": "no"}

    server.reply = first_hangs
    began = time.monotonic()
    with pytest.raises(Refusal, match="HTTP 401: no;"):
        ask(replace(endpoint, at_once=2), *"abcdef")
    assert time.monotonic() - began < 3
    time.sleep(0.5)
    assert sorted(server.questions()) == ["a", "b"]


def test_each_answer_is_handed_over_as_it_comes(endpoint, server):
    def waits_for_what_was_kept(number, body):
        said = echo(body)
        if body["messages"][0]["content"] == "d":
            assert server.ended.wait(5)  # set below, from within `keep`
        return said

    kept = []

    def keep(place, text):
        kept.append((place, text))
        if len(kept) == 3:
            server.ended.set()

    server.reply = waits_for_what_was_kept
    found = ask(endpoint, *"dabc", keep=keep)
    assert sorted(kept) == list(enumerate(found)) and kept[-1] == (0, "echo: d")
    assert found == [f"echo: {c}" for c in "dabc"]


@pytest.mark.parametrize("fault", ((401, {}, {"error": "no"}), (500, {}, b""), (200, {}, b"[]")))
def test_with_keep_a_failure_waits_for_what_is_under_way_and_starts_nothing_new(
        endpoint, server, fault):
    def second_fails(number, body):
        if body["messages"][0]["content"] == "b":
            return fault
        time.sleep(0.5)
        return echo(body)

    server.reply, kept = second_fails, {}
    with pytest.raises(Refusal) as refusal:
        ask(replace(endpoint, at_once=3, retries=0), *"abcdef", keep=kept.__setitem__)
    assert kept == {0: "echo: a", 2: "echo: c"} and sorted(server.questions()) == list("abc")
    assert isinstance(refusal.value, NoAnswer) == (fault[0] != 401)
    assert fault[0] == 401 or "; 2 of this batch's 6 had been answered" in str(refusal.value)


def test_an_answer_that_cannot_be_kept_ends_it(endpoint, server):
    def full(place, text):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        ask(replace(endpoint, at_once=1), *"abc", keep=full)
    assert len(server.seen) == 1


def test_an_interrupt_ends_it_at_once(endpoint, server):
    def interrupt(number, body):
        os.kill(os.getpid(), signal.SIGINT)
        server.ended.wait(20)

    server.reply = interrupt
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask(endpoint, "a")
    assert time.monotonic() - began < 5


def test_it_works_where_an_event_loop_is_running_as_in_a_notebook(endpoint):
    async def cell():
        return ask(endpoint, "a")

    assert asyncio.run(cell()) == ["echo: a"]


def test_this_machine_s_own_server_is_not_asked_through_a_proxy(endpoint, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    assert ask(endpoint, "a") == ["echo: a"]


@pytest.mark.parametrize("key", (None, "", " \n"))
def test_without_a_key_a_local_server_alone_is_asked(endpoint, server, monkeypatch, key):
    if key is None:
        monkeypatch.delenv("TEST_KEY")
    else:
        monkeypatch.setenv("TEST_KEY", key)
    endpoint.check()
    assert server.seen[0][1]["Authorization"] == "Bearer none"
    for url in ("https://models.invalid/v1", "http://0.0.0.0:1/v1", "http://localhost.invalid/v1"):
        for request in (lambda e: ask(e, "a"), Endpoint.check):
            with pytest.raises(Refusal, match=f"^{url}: no key: .* variable TEST_KEY$"):
                request(replace(endpoint, url=url))


def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(endpoint, monkeypatch):
    for key in (f"{KEY} {KEY}", f"{KEY}\n{KEY}", f"{KEY}ä"):
        monkeypatch.setenv("TEST_KEY", key)
        with pytest.raises(Refusal, match="TEST_KEY holds no key") as refusal:
            endpoint.check()
        assert KEY not in str(refusal.value)


@pytest.mark.parametrize("changes, said", (
    ({"url": "models.invalid/v1"}, "must look"), ({"url": "ftp://models.invalid"}, "must look"),
    ({"url": "http://[::1/v1"}, "must look"), ({"url": "http://h:port/v1"}, "must look"),
    ({"url": f"http://me:{KEY}@127.0.0.1/v1"}, "password"),
    ({"url": f"http://127.0.0.1/v1?key={KEY}"}, "query"),
    ({"at_once": 0}, "at_once"), ({"retries": -1}, "retries"), ({"timeout": 0}, "timeout")))
def test_an_endpoint_that_cannot_be_is_refused(endpoint, changes, said):
    with pytest.raises(Refusal, match=said) as refusal:
        replace(endpoint, **changes)
    assert KEY not in str(refusal.value)


def test_a_check_asks_for_one_token(endpoint, server):
    endpoint.check()
    (_, _, body), = server.seen
    assert body["max_tokens"] == 1
    server.reply = lambda number, body: (502, {}, b"")
    with pytest.raises(NoAnswer, match=r"\(retries: 0\), HTTP 502: Bad Gateway$"):
        replace(endpoint, retries=0).check()


# --- a real model behind `transformers serve` ---------------------------------------------------

QUESTIONS = ("what is this ?", "describe the big cat", "is there a dog ?",
             "what colour is the box ?", "yes", "no red green",
             "the picture shows", "is the cat on the mat ?", "a big hot dog")


class Served:
    """A checkpoint folder behind `transformers serve`, on the same port each time it is started."""

    def __init__(self, model: Path, logs: Path):
        self.model, self.logs, self.port, self.process = model, logs, free_port(), None

    def start(self) -> Path:
        """Starts it unless it runs. Its log."""
        if self.process is not None and self.process.poll() is None:
            return self.log
        self.log = self.logs / f"{time.monotonic_ns()}.txt"
        command = Path(sys.executable).with_name("transformers")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [command, "serve", self.model, "--device", "cpu", "--host", "127.0.0.1",
                 "--port", str(self.port)], stdout=log, stderr=subprocess.STDOUT)
        ends = time.monotonic() + 90
        while time.monotonic() < ends and self.process.poll() is None:
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                    f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return self.log
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def served(text_folder, tmp_path_factory):
    server = Served(text_folder, tmp_path_factory.mktemp("served"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def model(served, text_folder):
    return Endpoint(f"http://127.0.0.1:{served.port}/v1", str(text_folder), "UNSET_KEY", at_once=2,
                    retries=1, timeout=60)


@pytest.fixture(scope="module")
def expected(text_folder):
    """What the same checkpoint says to the questions when nothing lies between."""
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    model = AutoModelForCausalLM.from_pretrained(text_folder)
    found = []
    for prompt in prompts(*QUESTIONS):
        tokens = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True,
                                               return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = model.generate(**tokens, do_sample=False, max_new_tokens=6)
        found.append(tokenizer.decode(out[0, tokens["input_ids"].shape[1]:],
                                      skip_special_tokens=True).strip())
    assert len(set(found)) > 4
    return found


@pytest.mark.slow
def test_a_served_model_says_what_it_says_at_home(served, model, expected):
    served.start()
    model.check()
    for _ in range(2):
        assert ask(model, *QUESTIONS, temperature=0.0) == expected
    with pytest.raises(Refusal, match="model other: refused, HTTP 400: "):
        replace(model, model="other").check()


class LastStraw(tuple):
    """Messages that kill the server when their turn to be sent comes."""

    def __iter__(self):
        self.server.kill()
        return super().__iter__()


@pytest.mark.slow
def test_a_server_killed_midway_is_asked_for_the_rest_alone_when_it_is_back(
        served, model, expected, tmp_path):
    def asked(batches):
        done = len(file.read_text().splitlines()) if file.exists() else 0
        for batch in batches[done:]:
            texts = model.answers(batch, seeds=range(len(batch)), **SETTINGS | {"temperature": 0.0})
            with file.open("a") as stream:
                stream.write(f"{json.dumps(texts)}\n")

    def batches(questions):
        return [questions[i:i + 3] for i in range(0, len(questions), 3)]

    served.start()
    file, killing = tmp_path / "answers", prompts(*QUESTIONS)
    killing[5] = LastStraw(killing[5])
    killing[5].server = served
    with pytest.raises(NoAnswer, match="[12] of this batch's 3 had been answered, and what was "):
        asked(batches(killing))
    assert list(map(json.loads, file.read_text().splitlines())) == [expected[:3]]
    with pytest.raises(NoAnswer, match="0 of this batch's 3"):
        asked(batches(prompts(*QUESTIONS)))

    log = served.start()
    asked(batches(prompts(*QUESTIONS)))
    assert [t for line in file.read_text().splitlines() for t in json.loads(line)] == expected
    assert log.read_text().count(POSTED) == 6


@pytest.mark.slow
def test_pairs_go_on_when_the_server_that_injects_errors_dies_and_comes_back(
        served, model_folder, data_file, prompt_files, outputs, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    p = PairGeneration(
        study="s", model=str(model_folder), data=str(data_file), sources=["injected"],
        score_candidates=False, endpoint=f"http://127.0.0.1:{served.port}/v1",
        endpoint_model=str(served.model), endpoint_key_variable="SOME_KEY", endpoint_requests=1,
        endpoint_retries=0, max_new_tokens=6, **prompt_files)
    asked, right = [], Endpoint.answers
    log = served.start()
    before = log.read_text().count(POSTED)

    def watched(self, prompts, **settings):
        asked.append(len(prompts))
        if sum(asked) > 6:
            served.kill()  # two batches of four are asked for, the second finds nobody
        return right(self, prompts, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Endpoint, "answers", watched)
        with pytest.raises(NoAnswer, match="0 of this batch's 4"):
            pairs.run(p)
    shard, = (outputs / "s" / "2_pair_generation" / "shards").iterdir()
    assert len(shard.read_text().splitlines()) == 4
    assert log.read_text().count(POSTED) - before == 1 + 4  # the check and a batch

    log = served.start()
    result = pairs.run(p)
    assert log.read_text().count(POSTED) == 1 + 8
    made = records.read_lines(result.folder / "candidates.jsonl")
    assert [c["mode"] for line in made for c in line["candidates"]] == ["endpoint"] * 12
    everything = b"".join(f.read_bytes() for f in outputs.rglob("*") if f.is_file())
    assert b"SOME_KEY" in everything and KEY.encode() not in everything
