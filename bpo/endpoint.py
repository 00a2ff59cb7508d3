"""Asking a model behind an OpenAI-compatible endpoint: vLLM, llama.cpp, `transformers serve`, a
hosted one. It knows addresses, keys, retries and refusals; what is asked, and keeping the answers,
is the caller's. Nothing is sent before `answers` or `check` is called.
"""

import ipaddress
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
from anyio.from_thread import start_blocking_portal

from bpo.params import Refusal

if TYPE_CHECKING:
    import openai

LONGEST_LINE = 300  # characters of a server's message that are shown
MAY_PASS = (408, 409, 429)  # of HTTP's 4xx, those that are worth another try
TO_DO = {
    401: "put a valid key into the environment variable {variable}",
    403: "put a key that may use it into the environment variable {variable}",
    404: "the url must end before /chat/completions, often in /v1, and the model must be one that "
         "the server has",
}


class NoAnswer(Refusal):
    """What was asked had no answer now but may have one later, unlike a request that is refused."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how patiently.

    url: up to where /chat/completions begins, such as http://127.0.0.1:8000/v1.
    key_variable: name of the environment variable that holds the key. The key itself is read for
        each call and is never kept, shown or written.
    at_once: requests under way at the same time.
    retries: of one request, after a lost connection, a time-out, or HTTP 408, 409, 429 or 5xx.
        They wait 0.5, 1, 2, 4, then 8 seconds, less up to a quarter by chance, or as long as the
        server's Retry-After says; more than two minutes of that end the retries.
    timeout: seconds without a byte from the server after which a request counts as lost.
    """

    url: str
    model: str
    key_variable: str
    at_once: int
    retries: int
    timeout: float

    def __post_init__(self) -> None:
        if set("@?") & set(self.url):
            # Not shown: what stands there may be a password.
            raise Refusal("url: has a user, a password or a query; leave it out and put the key "
                          f"into the environment variable {self.key_variable}")
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise Refusal(f"url {self.url!r}: must look like http://127.0.0.1:8000/v1")
        if self.at_once < 1 or self.retries < 0 or self.timeout <= 0:
            raise Refusal(f"{self.url}: at_once must be 1 or more, retries 0 or more and timeout "
                          f"above 0, are {self.at_once}, {self.retries} and {self.timeout}")

    def answers(self, prompts: Sequence[Sequence[Mapping[str, str]]], *, temperature: float,
                top_p: float, max_new_tokens: int, seeds: Sequence[int],
                keep: Callable[[int, str], None] | None = None) -> list[str]:
        """One answer a prompt, in the prompts' order; "" where the model said nothing.

        prompts: of each, the messages {role, content} that end with the question.
        seeds: one a prompt, sent with it; whether it fixes the draws is up to the server.
        keep: is given each prompt's number and answer as the answer comes, one at a time.
        Raises Refusal when one request is refused or stays without an answer; nothing new is asked
        then. The others under way are cancelled, so the batch should be small enough to be asked
        for again; with `keep` they are waited for, so that none is paid for and lost.
        """
        texts: list[str | None] = [None] * len(prompts)
        try:
            self._ask(texts, prompts, seeds, keep, temperature=temperature, top_p=top_p,
                      max_tokens=max_new_tokens)
        except NoAnswer as error:
            done = len(texts) - texts.count(None)
            raise NoAnswer(f"{error}; {done} of this batch's {len(texts)} had been answered, and "
                           "what was written so far is kept: the same command goes on from "
                           "there") from None
        return texts

    def check(self) -> None:
        """Asks for one token; raises Refusal when url, model or key cannot be used.

        A request proves more than a list of models does: many servers list them without a key,
        under other names, or not at all.
        """
        self._ask([None], [({"role": "user", "content": "Say yes."},)], [0], temperature=0.0,
                  top_p=1.0, max_tokens=1)

    def _ask(self, texts: list[str | None], prompts: Sequence[Sequence[Mapping[str, str]]],
             seeds: Sequence[int], keep: Callable[[int, str], None] | None = None,
             **settings: Any) -> None:
        """Fills `texts` as answers come. max_tokens is the name that the most servers know."""
        import openai  # takes more than a second, and few studies have an endpoint

        key = self._key()
        left = iter(list(enumerate(zip(prompts, seeds, strict=True))))
        failed: list[Exception] = []

        async def ask_one_after_another(client: openai.AsyncOpenAI) -> None:
            for place, (messages, seed) in left:  # shared: each takes what nobody has taken yet
                try:
                    said = await client.chat.completions.create(
                        model=self.model, messages=[dict(m) for m in messages], seed=seed,
                        **settings)
                    texts[place] = self._text(said, key)
                except (openai.APIError, ValueError, NoAnswer) as error:
                    if keep is None:
                        raise
                    failed.append(error)
                    list(left)  # nobody finds another one to take
                else:
                    if keep is not None:
                        keep(place, texts[place])

        async def ask_all() -> None:
            # A proxy cannot reach this machine's own servers.
            http = openai.DefaultAsyncHttpxClient(trust_env=not self._is_local())
            async with openai.AsyncOpenAI(
                    base_url=self.url, api_key=key or "none", max_retries=self.retries,
                    timeout=self.timeout, http_client=http) as client:
                # One failure cancels the group.
                async with anyio.create_task_group() as group:
                    for _ in range(min(self.at_once, len(prompts))):
                        group.start_soon(ask_one_after_another, client)
                if failed:
                    raise ExceptionGroup("", failed)

        try:
            # A thread of its own: in a notebook this one has an event loop already.
            with start_blocking_portal() as portal:
                portal.call(ask_all)
        except ExceptionGroup as group:
            error = group.exceptions[0]
            if isinstance(error, (openai.APIError, ValueError)):
                error = self._refusal(error, key)
            # `from None`: what openai raised holds the request, and so the key.
            raise error from None

    def _text(self, said: Any, key: str) -> str:
        """The text of a completion. A page or an error sent as HTTP 200 is not an answer."""
        if getattr(said, "choices", None):
            return (said.choices[0].message.content or "").strip()
        line = _first_line(getattr(said, "error", said), key)
        raise NoAnswer(f"{self.url}, model {self.model}: what came is no chat completion: {line}")

    def _refusal(self, error: "openai.APIError | ValueError", key: str) -> Refusal:
        import openai

        where = f"{self.url}, model {self.model}"
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            line = _first_line(error.body or error.response.reason_phrase, key)
            seen = f"HTTP {status}: {line}"
            if 400 <= status < 500 and status not in MAY_PASS:
                to_do = TO_DO.get(status, "change what it names").format(variable=self.key_variable)
                return Refusal(f"{where}: refused, {seen}; {to_do}")
        elif isinstance(error, openai.APITimeoutError):
            seen = f"silent for {self.timeout:g} s"
        else:
            seen = f"no usable reply: {_first_line(error.__cause__ or error, key)}"
        return NoAnswer(f"{where}: gave up (retries: {self.retries}), {seen}")

    def _is_local(self) -> bool:
        host = urlsplit(self.url).hostname
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def _key(self) -> str:
        """The key, or "" for a server on this machine that may want none."""
        key = os.environ.get(self.key_variable, "").strip()
        if not key and not self._is_local():
            raise Refusal(f"{self.url}: no key: put it into the environment variable "
                          f"{self.key_variable}")
        if not all("!" <= c <= "~" for c in key):
            raise Refusal(f"the environment variable {self.key_variable} holds no key: a key has "
                          "no spaces, line breaks or accented letters")
        return key


def _first_line(said: Any, key: str) -> str:
    """The first line of a server's message, in whichever of the usual wrappings, without the key.
    """
    while isinstance(said, Mapping) and (inner := next(
            (said[n] for n in ("error", "message", "detail") if said.get(n)), None)):
        said = inner
    text = str(said).replace(key, "<key>") if key else str(said)
    lines = text.strip().splitlines() or ["nothing"]
    return lines[0][:LONGEST_LINE].strip().rstrip(".")
