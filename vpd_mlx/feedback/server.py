"""C = what a model behind an OpenAI-compatible endpoint says of a completion, having seen the right answer.

mlx_lm.server, LM Studio, Ollama, llama.cpp or a paid service. Answers are kept on disk by their request, so that none is
paid for twice and a resumed run hears what it heard before.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import ipaddress
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from vpd_mlx import __version__
from vpd_mlx.common.settings import Positive, Section
from vpd_mlx.errors import ConfigError, Fault, SourceError
from vpd_mlx.feedback.settings import unset
from vpd_mlx.prompts import Prompter, demonstration
from vpd_mlx.types import Problem, Rollout

__all__ = ["Reply", "Server", "ServerKeys", "ServerSettings", "Transport", "post"]

LONGEST = 4 << 20  # bytes of one answer
PAUSES = (0.5, 30.0)  # seconds before the first further attempt, and at most
CACHE = "feedback-cache"  # folder in the run folder


class ServerSettings(Section):
    """A model behind an OpenAI-compatible endpoint, asked for feedback: mlx_lm.server, LM Studio, Ollama, llama.cpp …"""

    paths: ClassVar[tuple[str, ...]] = ("cache_dir",)

    url: str | None = Field(
        None,
        pattern=r"^https?://[^/\s]+(/\S*)?$",
        description="Where it listens, e.g. `http://127.0.0.1:8080/v1`. Source `server` needs it.",
    )
    model: str = Field(
        "default_model", description="Name of the model in requests; mlx_lm.server knows `default_model`."
    )
    api_key_env: str | None = Field(
        None,
        description="Name of the environment variable that holds the key; the key itself never stands in a recipe.",
    )
    concurrency: Positive = Field(4, description="Requests under way at once.")
    timeout: float = Field(60.0, gt=0, description="Seconds for one answer.")
    retries: int = Field(
        3, ge=0, description="Further attempts after a timeout, a lost connection, status 429 or 5xx, each later."
    )
    budget_requests: Positive | None = Field(
        None,
        description="Most requests of a run, retries among them; then it has nothing more to say. null has no bound.",
    )
    cache_dir: str | None = Field(
        None, description="Folder of answers by request, to be shared by runs; null keeps them in the run folder."
    )
    temperature: float = Field(0.0, ge=0, description="Sampling temperature of the answers.")
    max_tokens: Positive = Field(256, description="Longest answer in tokens.")


class ServerKeys(Section):
    """What `server` adds to the section `feedback`."""

    server: ServerSettings = ServerSettings()

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """The address must be given."""
        remedy = "give its address, e.g. http://127.0.0.1:8080/v1"
        yield from unset("server", "server.url", self.server.url, remedy, recipe)
        yield from super().faults(recipe)

    def located(self, folder: Path) -> Self:
        """The cache, as seen from the recipe's folder."""
        return super().located(folder).model_copy(update={"server": self.server.located(folder)})


@dataclass(frozen=True)
class Reply:
    """Status and body of an HTTP answer, and how many seconds the server asks us to wait."""

    status: int
    body: bytes
    retry_after: float | None = None


Transport = Callable[[str, Mapping[str, str], bytes, float], Reply]
"""(url, headers, body, seconds) -> the answer, whatever its status. Raises OSError where there is none."""


class Server:
    """One endpoint, asked from several threads."""

    def __init__(
        self, cfg: ServerSettings, prompter: Prompter, note: Callable[[str], None], transport: Transport | None = None
    ) -> None:
        """Checks what can be checked without asking.

        Raises:
            ConfigError: the key's environment variable is not set.
        """
        self._cfg = cfg
        self._prompter = prompter
        self._note = note
        self._transport = transport or post
        self._url = _endpoint(cfg.url or "")
        self._headers = {"Content-Type": "application/json", "User-Agent": f"vpd-mlx/{__version__}"}
        if cfg.api_key_env is not None:
            key = os.environ.get(cfg.api_key_env, "").strip()
            if not key:
                what = f"the environment variable {cfg.api_key_env!r} is not set"
                raise ConfigError([Fault("feedback.server.api_key_env", what, "export it, with the key")])
            self._headers["Authorization"] = f"Bearer {key}"
        self._cache = None if cfg.cache_dir is None else Path(cfg.cache_dir)
        self._lock = threading.Lock()
        self._asking: dict[str, threading.Lock] = {}
        self._closed = threading.Event()
        self._sent = 0
        self._said: set[str] = set()

    def ask(self, problem: Problem, rollout: Rollout) -> str | None:
        """The model's words, from the cache where it was asked the same before. None once the budget is spent.

        Raises:
            SourceError: no usable answer, after all attempts.
        """
        words = rollout.verdict.text if rollout.verdict is not None else ""
        message = self._prompter.critic_message(problem, rollout.text, words, right=rollout.success)
        request = {
            "model": self._cfg.model,
            "messages": [{"role": "user", "content": message}],
            "temperature": self._cfg.temperature,
            "max_tokens": self._cfg.max_tokens,
            "stream": False,
        }
        key = hashlib.sha256(json.dumps([self._url, request], sort_keys=True).encode()).hexdigest()
        with self._lock:
            asking = self._asking.setdefault(key, threading.Lock())
        with asking:  # the same request from another thread waits for this one's answer
            text = self._cached(key)
            if text is None:
                text = self._ask(json.dumps(request).encode())
                if text is None:
                    return None
                self._keep(key, request, text)
        return demonstration(text) or None

    def _ask(self, body: bytes) -> str | None:
        first, most = PAUSES
        for attempt in range(self._cfg.retries + 1):
            if not self._may_ask():
                return None
            wait: float | None = None
            try:
                reply = self._transport(self._url, self._headers, body, self._cfg.timeout)
            except (OSError, http.client.HTTPException) as error:  # TimeoutError is an OSError
                why = _reason(error, self._cfg.timeout)
            else:
                if reply.status == 200:
                    return _content(reply.body)
                why, wait = f"status {reply.status}{_detail(reply.body)}", reply.retry_after
                if reply.status != 429 and reply.status < 500:
                    break  # it will say the same again
            if attempt < self._cfg.retries and self._closed.wait(
                min(most, first * 2.0**attempt if wait is None else wait)
            ):
                why = "the run is ending"
                break
        raise SourceError(f"{self._url}: {why}")

    def _may_ask(self) -> bool:
        budget = self._cfg.budget_requests
        with self._lock:
            if budget is None or self._sent < budget:
                self._sent += 1
                return True
        self._say(
            f"the budget of {budget} requests is spent: the server is asked no more (feedback.server.budget_requests)"
        )
        return False

    def _say(self, text: str) -> None:
        with self._lock:
            new = text not in self._said
            self._said.add(text)
        if new:
            self._note(text)

    # --- the cache

    def _file(self, key: str) -> Path | None:
        return None if self._cache is None else self._cache / key[:2] / f"{key}.json"

    def _cached(self, key: str) -> str | None:
        file = self._file(key)
        if file is None:
            return None
        try:
            text = json.loads(file.read_text(encoding="utf-8"))["answer"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # none yet, or damaged: ask again
        return text if isinstance(text, str) else None

    def _keep(self, key: str, request: Mapping[str, Any], text: str) -> None:
        file = self._file(key)
        if file is None:
            return
        partial = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"url": self._url, "request": request, "answer": text}), encoding="utf-8")
            os.replace(partial, file)
        except OSError as error:  # the answer is there all the same
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self._say(
                f"{file.parent}: cannot be written ({error.strerror or error}), so answers of the server are not kept"
            )

    def open(self, folder: Path) -> None:
        """Keep answers in the run folder, where the recipe names no other."""
        if self._cache is None:
            self._cache = folder / CACHE

    def close(self) -> None:
        """Make no further attempt."""
        self._closed.set()

    def state(self) -> dict[str, Any]:
        """Requests sent, for the budget."""
        return {"sent": self._sent}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with the budget."""
        self._sent = int(state.get("sent", 0))


class _Straight(urllib.request.HTTPRedirectHandler):
    """No detours: a redirected POST would arrive elsewhere as a GET, and the key with it."""

    def redirect_request(self, *_: Any) -> None:
        return None


def post(url: str, headers: Mapping[str, str], body: bytes, seconds: float) -> Reply:
    """One POST. Proxies of the environment are used, but not for this machine itself.

    Raises:
        OSError: no connection, or no whole answer within `seconds`.
    """
    local = _is_local(urllib.parse.urlsplit(url).hostname or "")
    opener = urllib.request.build_opener(_Straight, *([urllib.request.ProxyHandler({})] if local else []))
    until = time.monotonic() + seconds
    request = urllib.request.Request(url, data=body, headers=dict(headers), method="POST")
    try:
        response = opener.open(request, timeout=seconds)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        parts: list[bytes] = []
        # The socket's limit holds for each read: an answer in drops needs a limit of its own.
        while chunk := response.read1(1 << 16):
            parts.append(chunk)
            if time.monotonic() > until:
                raise TimeoutError
            if sum(map(len, parts)) > LONGEST:
                raise OSError(f"an answer of more than {LONGEST >> 20} MB")
        after = response.headers.get("Retry-After", "")
        return Reply(response.status or 0, b"".join(parts), float(after) if after.isdigit() else None)


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _endpoint(url: str) -> str:
    url = url.rstrip("/")
    if url.endswith("/chat/completions"):
        return url
    return url + ("/chat/completions" if urllib.parse.urlsplit(url).path else "/v1/chat/completions")


def _reason(error: Exception, seconds: float) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {seconds:g} s (feedback.server.timeout)"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause) or type(cause).__name__


def _detail(body: bytes) -> str:
    text = " ".join(body[:2000].decode(errors="replace").split())
    return f" ({text[:160]})" if text else ""


def _content(body: bytes) -> str:
    try:
        text = json.loads(body)["choices"][0]["message"].get("content") or ""
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise SourceError(f"an answer that is no chat completion{_detail(body)}") from None
    if not isinstance(text, str):
        raise SourceError(f"an answer whose content is no text{_detail(body)}")
    return text
