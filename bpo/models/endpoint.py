"""Asks a model behind an OpenAI-compatible endpoint: vLLM, llama.cpp, `transformers serve`, a
hosted one. Nothing is sent before `answers` or `check` is called.
"""

import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from bpo.params import Refusal

URL = r"https?://(\[[\da-fA-F:.]+\]|[\w.-]+)(:\d+)?(/[^\s@?#]*)?"
LOCAL = r"https?://(localhost|127(\.\d+){3}|\[::1\])([:/].*)?"
MAY_PASS = (408, 409, 429)  # of HTTP's 4xx, those that are worth another try
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
    """

    url: str
    model: str
    key_variable: str
    at_once: int
    retries: int
    timeout: float

    def __post_init__(self) -> None:
        if not re.fullmatch(URL, self.url):
            shown = self.url.rpartition("@")[2].partition("?")[0]  # the rest may be a password
            raise Refusal(f"url {shown}: must look like http://127.0.0.1:8000/v1, without user, "
                          "password or query; put the key into the environment variable "
                          f"{self.key_variable}")

    def check(self) -> None:
        """Asks for one token, which proves more than a list of models; raises as `answers` does."""
        self.answers([({"role": "user", "content": "Say yes."},)], temperature=0.0, top_p=1.0,
                     max_new_tokens=1, seeds=[0])

    def answers(self, prompts: Sequence[Sequence[Mapping[str, str]]], *, temperature: float,
                top_p: float, max_new_tokens: int, seeds: Sequence[int],
                keep: Callable[[int, str], None] = lambda place, text: None) -> list[str]:
        """One answer a prompt, in the prompts' order; "" where the model said nothing.

        prompts: messages {role, content} that end with the question.  seeds: one a prompt.
        keep: gets each prompt's number and answer as it comes, one at a time, before the next
            question. Raises Refusal, or what `keep` raised: nothing new is asked then, and the
            requests under way are waited for.
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
        texts, failures, lock = [None] * len(prompts), [], threading.Lock()

        def ask(place: int, messages: Sequence[Mapping[str, str]], seed: int) -> None:
            if failures:
                return
            try:
                reply = client.chat.completions.create(
                    model=self.model, messages=[dict(m) for m in messages], seed=seed,
                    temperature=temperature, top_p=top_p, max_tokens=max_new_tokens)
                if not getattr(reply, "choices", None):  # a page or an error sent as HTTP 200
                    raise ValueError(_first_line(getattr(reply, "error", reply), key))
                text = (reply.choices[0].message.content or "").strip()
                with lock:
                    keep(place, text)
                texts[place] = text
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
            answered = f"{len(texts) - texts.count(None)} of this batch's {len(texts)}"
            raise self._refusal(failures[0], key, answered)
        return texts

    def _refusal(self, error: Exception, key: str, answered: str) -> Exception:
        """What is raised in place of an error of openai, which holds the request and so the key."""
        import openai

        where = f"{self.url}, model {self.model}"
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            seen = f"HTTP {status}: {_first_line(error.body or error.response.reason_phrase, key)}"
            if status < 500 and status not in MAY_PASS:
                remedy = REMEDIES.get(status, "change what it names").format(self.key_variable)
                return Refusal(f"{where}: refused, {seen}; {remedy}")
        elif isinstance(error, openai.APITimeoutError):
            seen = f"silent for {self.timeout:g} s"
        elif isinstance(error, openai.APIError | ValueError):
            seen = f"no usable reply: {_first_line(error.__cause__ or error, key)}"
        else:
            return error  # of `keep`
        return Refusal(f"{where}: gave up (retries: {self.retries}), {seen}; {answered} had been "
                       "answered, and what was written so far is kept: the same command goes on "
                       "from there")


def _first_line(message: Any, key: str) -> str:
    """The first line of a server's message, out of the usual wrappings and without the key."""
    while isinstance(message, Mapping) and (inner := next(
            (message[n] for n in ("error", "message", "detail") if message.get(n)), None)):
        message = inner
    text = str(message).replace(key, "<key>") if key else str(message)
    return (text.strip().splitlines() or ["nothing"])[0][:300].strip().rstrip(".")
