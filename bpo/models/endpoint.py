"""Asks a model behind an OpenAI-compatible endpoint: vLLM, llama.cpp, `transformers serve`, a
hosted one. Nothing is sent before `answers` or `check` is called.
"""

import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bpo.models.replies import REFUSED, Reply
from bpo.params import Refusal
from bpo.study.files import to_json

Prompt = Sequence[Mapping[str, str]] | Callable[[], Sequence[Mapping[str, Any]]]
URL = r"https?://(\[[\da-fA-F:.]+\]|[\w.-]+)(:\d+)?(/[^\s@?#]*)?"
LOCAL = r"https?://(localhost|127(\.\d+){3}|\[::1\])([:/].*)?"
MAY_PASS = (408, 409, 429)  # of HTTP's 4xx, those that are worth another try
OF_PROMPT = (400, 413, 422)  # those that may be about one prompt: too long, filtered, malformed
# Of a vLLM server's configuration, what may change its answers
ARGUMENTS = (("model_config", "dtype"), ("model_config", "quantization"),
             ("model_config", "generation_config"), ("model_config", "enforce_eager"),
             ("cache_config", "cache_dtype"), ("parallel_config", "tensor_parallel_size"),
             ("parallel_config", "pipeline_parallel_size"))
REMEDIES = {401: "put a valid key into the environment variable {}",
            403: "put a key that may use it into the environment variable {}",
            404: "the url must end before /chat/completions, often in /v1, and the model must be "
                 "one that the server has"}


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how patiently.

    url: up to where /chat/completions begins, such as http://127.0.0.1:8000/v1.
    key_variable: the environment variable that holds the key, which is never shown or written.
    at_once: requests under way at the same time.
    retries: of one request, after a lost connection, a time-out, or HTTP 408, 409, 429 or 5xx,
        after 0.5, 1, 2, 4, then 8 seconds, or what the server's Retry-After says.
    timeout: seconds without a byte from the server after which a request counts as lost.
    extra: settings of every request that a server has beside OpenAI's.
    """

    url: str
    model: str
    key_variable: str
    at_once: int
    retries: int
    timeout: float
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(URL, self.url):
            shown = self.url.rpartition("@")[2].partition("?")[0]  # the rest may be a password
            raise Refusal(f"url {shown}: must look like http://127.0.0.1:8000/v1, without user, "
                          "password or query; put the key into the environment variable "
                          f"{self.key_variable}")

    def check(self, *, temperature: float, top_p: float, max_new_tokens: int) -> None:
        """Asks a question of three words with the settings of those to come, which proves more than
        a list of models; raises as `answers` does, and where the server refuses it."""
        [reply] = self.answers([({"role": "user", "content": "Say yes."},)], seeds=[0],
                               temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
        if reply.status != 200:
            raise self.refuses(reply)

    def refuses(self, reply: Reply) -> Refusal:
        """What to raise where the server refuses everything as it did in this reply."""
        remedy = REMEDIES.get(reply.status, "change what it names").format(self.key_variable)
        return Refusal(f"{self.url}, model {self.model}: refused, HTTP {reply.status}: "
                       f"{reply.text}; {remedy}")

    def answers(self, prompts: Sequence[Prompt], *, temperature: float, top_p: float,
                max_new_tokens: int, seeds: Sequence[int],
                keep: Callable[[int, Reply], None] = lambda place, reply: None,
                reads: Sequence[Callable[[Any, Reply], Reply]] = ()) -> list[Reply]:
        """One reply a prompt, in the prompts' order, as it came. A prompt that the server refuses
        (HTTP 400, 413, 422) has its status and message for a reply, and the others go on.

        prompts: messages {role, content} that end with the question, or what makes them when their
            turn comes.  seeds: one a prompt.
        keep: gets each prompt's number and reply as it comes, one at a time, before the next
            question. Raises Refusal, or what `keep` raised: nothing new is asked then, and the
            requests under way are waited for.
        reads: one a prompt: what its whole completion, with the reply in it, counts as; may raise
            Refusal.
        """
        import openai  # takes a second, and few studies ask an endpoint

        local = re.fullmatch(LOCAL, self.url)
        key = os.environ.get(self.key_variable, "").strip()
        if not re.fullmatch("[!-~]*" if local else "[!-~]+", key):
            raise Refusal(f"{self.url}: no key: put one without spaces, line breaks or accented "
                          f"letters into the environment variable {self.key_variable}")
        client = openai.OpenAI(
            base_url=self.url, api_key=key or "none", timeout=self.timeout,
            max_retries=self.retries,
            # A proxy cannot reach this machine's own servers.
            http_client=openai.DefaultHttpxClient(trust_env=not local))
        replies, failures, lock = [None] * len(prompts), [], threading.Lock()

        def ask(place: int, prompt: Prompt, seed: int) -> None:
            if failures:
                return
            try:
                try:
                    messages = prompt() if callable(prompt) else [dict(m) for m in prompt]
                    completion = client.chat.completions.create(
                        model=self.model, messages=messages, seed=seed, temperature=temperature,
                        top_p=top_p, max_tokens=max_new_tokens, extra_body=self.extra or None)
                    reply = _reply(completion, key)
                    reply = reads[place](completion, reply) if reads else reply
                except openai.APIStatusError as error:
                    if error.status_code not in OF_PROMPT:
                        raise
                    reply = Reply(_said(error, key), None, error.status_code)
                with lock:
                    keep(place, reply)
                replies[place] = reply
            except Exception as error:
                failures.append(error)

        pool = ThreadPoolExecutor(self.at_once)
        try:
            wait([pool.submit(ask, place, *request)
                  for place, request in enumerate(list(zip(prompts, seeds, strict=True)))])
        finally:  # an interrupt does not wait
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()
        if failures:
            answered = f"{len(replies) - replies.count(None)} of this batch's {len(replies)}"
            raise self._refusal(failures[0], key, answered)
        return replies

    def server(self) -> dict[str, Any]:
        """What a vLLM server says of itself: {engine, model, root, max_model_len}, and ARGUMENTS
        where it runs with VLLM_SERVER_DEV_MODE=1. Raises Refusal where none is there, or it has no
        model."""
        import openai

        local = re.fullmatch(LOCAL, self.url)
        key = os.environ.get(self.key_variable, "").strip()
        with openai.OpenAI(base_url=self.url, api_key=key or "none", max_retries=self.retries,
                           timeout=self.timeout, http_client=openai.DefaultHttpxClient(
                               trust_env=not local)) as client:
            def get(path: str) -> dict[str, Any]:
                return client.get(re.sub("/v1/?$", "", self.url) + path, cast_to=dict[str, Any])

            try:
                models = client.models.list().data
                version = get("/version")["version"]
                try:
                    config = get("/server_info?config_format=json")["vllm_config"]
                except openai.NotFoundError:
                    config = {}
            except (openai.APIError, ValueError, KeyError) as error:
                raise self._refusal(error, key, "nothing") from None
        if not models:
            raise Refusal(f"{self.url}: the server has no model")
        more = models[0].model_extra or {}
        return {"engine": f"vllm {version}", "model": models[0].id,
                **{n: more[n] for n in ("root", "max_model_len") if n in more},
                **{n: str(config[part][n]) for part, n in ARGUMENTS if n in config.get(part, {})}}

    def _refusal(self, error: Exception, key: str, answered: str) -> Exception:
        """What is raised in place of an error of openai, which holds the request and so the key."""
        import openai

        where = f"{self.url}, model {self.model}"
        if isinstance(error, openai.APIStatusError):
            if error.status_code < 500 and error.status_code not in MAY_PASS:
                return self.refuses(Reply(_said(error, key), None, error.status_code))
            seen = f"HTTP {error.status_code}: {_said(error, key)}"
        elif isinstance(error, openai.APITimeoutError):
            seen = f"silent for {self.timeout:g} s"
        elif isinstance(error, openai.APIError | ValueError):
            seen = f"no usable reply: {_first_line(error.__cause__ or error, key)}"
        else:
            return error  # of `keep`
        return Refusal(f"{where}: gave up (retries: {self.retries}), {seen}; {answered} had been "
                       "answered, and what was written so far is kept: the same command goes on "
                       "from there")


def keep_answers(endpoint: Endpoint, file: Path, replies: dict[str, Reply],
                 prompts: Mapping[str, Prompt], *, seeds: Sequence[int],
                 notes: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
                 done: Callable[[], object] = lambda: None, **settings: Any) -> None:
    """Adds the replies to prompts (by key) to a file of JSON lines and to `replies`, as they come:
    each is on the disk before the next question. notes: by key, what else its line is to hold.
    settings: those of `Endpoint.answers`."""
    keys = list(prompts)

    def keep(place: int, reply: Reply) -> None:
        key = keys[place]
        line = {"key": key, "model": endpoint.model, **notes.get(key, {}), "status": reply.status,
                "finish_reason": reply.finish, "reply": reply.text}
        with file.open("ab") as stream:  # opened for each, so that an interrupt closes none
            stream.write(f"{to_json(line)}\n".encode())
            stream.flush()
            os.fsync(stream.fileno())
        replies[key] = reply
        done()

    endpoint.answers(list(prompts.values()), keep=keep, seeds=seeds, **settings)


def kept(file: Path) -> dict[str, Reply]:
    """key -> reply of such a file, without prompts that the server refused; what a kill left of the
    last line is cut off."""
    *lines, torn = file.read_bytes().split(b"\n") if file.is_file() else [b""]
    replies = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if record.get("status", 200) == 200:
                replies[record["key"]] = Reply(record["reply"], record.get("finish_reason"))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise Refusal(f"{file}, line {number}: is no reply of a judge; remove the line, and "
                          "its question is asked again") from None
    if torn:
        os.truncate(file, file.stat().st_size - len(torn))
    return replies


def _reply(completion: Any, key: str) -> Reply:
    """The first choice of a completion. Raises ValueError where there is no list of choices: a page
    or an error sent as HTTP 200."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices and getattr(completion, "error", None):
        raise ValueError(_first_line(getattr(completion, "error", completion), key))
    message = choices[0].message if choices else None
    finish = choices[0].finish_reason if choices else None
    text = _text(getattr(message, "content", None))
    if not text and (refusal := getattr(message, "refusal", None)):
        text, finish = _text(refusal), REFUSED
    return Reply(text, finish)


def _text(content: Any) -> str:
    """The text of a message's content: a text, None, or a list of parts, of which those that are
    text count: not thoughts."""
    if isinstance(content, list):
        parts = [p if isinstance(p, Mapping) else {"type": "text", "text": p} for p in content]
        content = "".join(str(p.get("text") or "") for p in parts
                          if p.get("type", "text") in ("text", "output_text"))
    return content.strip() if isinstance(content, str) else ""


def _said(error: Any, key: str) -> str:
    """What the server said in an HTTP error."""
    return _first_line(error.body or error.response.reason_phrase, key)


def _first_line(message: Any, key: str) -> str:
    """The first line of a server's message, out of the usual wrappings and without the key."""
    while isinstance(message, Mapping) and (inner := next(
            (message[n] for n in ("error", "message", "detail") if message.get(n)), None)):
        message = inner
    text = str(message).replace(key, "<key>") if key else str(message)
    return (text.strip().splitlines() or ["nothing"])[0][:300].strip().rstrip(".")
