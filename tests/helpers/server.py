"""A chat server whose replies a test writes, and an endpoint that asks it, as fixtures."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bpo.models.endpoint import Endpoint

KEY = "sk-very-secret-0123456789"


class Scripted(ThreadingHTTPServer):
    """Answers "echo: <question>", or what `reply` returns for a request's number and body:
    (status, headers, body), or None for a connection closed without a word."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.seen, self.under_way, self.most = [], 0, 0  # seen: (time, headers, body)
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.reply = lambda number, body: echo(body)
        self.info = None  # what a server in vLLM's development mode says of its configuration

    def handle_error(self, *_):
        pass  # a client that has given up

    def questions(self):
        return [question(body) for _, _, body in self.seen]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """What a vLLM server says of itself."""
        said = {"/version": {"version": "0.0"}, "/v1/models": {"object": "list", "data": [
            {"id": "served", "object": "model", "created": 0, "owned_by": "vllm", "root": "/m",
             "max_model_len": 512}]}, "/server_info?config_format=json": self.server.info
                }.get(self.path)
        content = json.dumps(said).encode()
        self.send_response(200 if said else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.seen)
            self.headers["Path"] = self.path
            server.seen.append((time.monotonic(), self.headers, body))
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        reply = server.reply(number, body)
        with server.lock:
            server.under_way -= 1
        if reply is None:
            self.close_connection = True
            return
        status, headers, content = reply
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers,
                            "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def question(body):
    return body["messages"][-1]["content"]


def completion(content, finish="stop", **message):
    return 200, {}, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices":
                     [{"index": 0, "finish_reason": finish,
                       "message": {"role": "assistant", "content": content, **message}}]}


def echo(body):
    return completion(f"echo: {question(body)}")


def prompts(*texts):
    return [({"role": "user", "content": t},) for t in texts]


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


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
