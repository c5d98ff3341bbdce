"""C = the feedback of a model behind an OpenAI-compatible endpoint, which sees the right answer.

mlx_lm.server, LM Studio, Ollama, llama.cpp or a paid service. Answers are kept on disk by their request, so that none is
paid for twice and a resumed run gets the same answers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import ipaddress
import json
import os
import re
import socket
import threading
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from vpd_mlx import __version__
from vpd_mlx.common.settings import Positive, Section
from vpd_mlx.common.thoughts import without_thoughts
from vpd_mlx.errors import SourceError, config_error
from vpd_mlx.feedback.base import Host, SourceEntry
from vpd_mlx.feedback.outside import Asking
from vpd_mlx.feedback.prompts import Prompter
from vpd_mlx.types import Problem, Rollout

if TYPE_CHECKING:
    import httpx

__all__ = ["SERVER", "Server", "ServerKeys", "ServerSettings"]

LONGEST = 4 << 20  # bytes of one answer
PAUSES = (0.5, 30.0)  # seconds before the second attempt, and at most
SECRET = 8  # characters: a shorter key, such as `none`, is no secret, and a word of the answer
PROBE_SECONDS = 10.0
CACHE = "feedback-cache"  # folder in the run folder


class ServerSettings(Section):
    """A model behind an OpenAI-compatible endpoint, asked for feedback: mlx_lm.server, LM Studio, Ollama, llama.cpp …"""

    paths: ClassVar[tuple[str, ...]] = ("cache_dir",)

    url: str | None = Field(
        None,
        pattern=r"^https?://[^/\s]+(/\S*)?$",
        description="Its address, e.g. `http://127.0.0.1:8080/v1`. Source `server` needs it.",
    )
    model: str = Field(
        "default_model", description="Name of the model in requests; mlx_lm.server accepts `default_model`."
    )
    api_key_env: str | None = Field(
        None,
        description="Name of the environment variable that holds the key; the key itself never stands in a recipe.",
    )
    concurrency: Positive = Field(4, description="Requests under way at once.")
    timeout: float = Field(60.0, gt=0, description="Seconds for one answer, from the connection to its last byte.")
    retries: int = Field(
        3,
        ge=0,
        description="Further attempts after a timeout, a lost connection, status 429 or 5xx, with growing pauses.",
    )
    budget_requests: Positive | None = Field(
        None,
        description="Most requests of a run, retries included; after that the source has no more answers. null has no bound.",
    )
    cache_dir: str | None = Field(
        None, description="Folder of answers by request, which runs may share; null keeps them in the run folder."
    )
    temperature: float = Field(0.0, ge=0, description="Sampling temperature of the answers.")
    max_tokens: Positive = Field(256, description="Longest answer in tokens.")


class ServerKeys(Section):
    """What `server` adds to the section `feedback`."""

    server: ServerSettings = ServerSettings()


class Server(Asking):
    """One endpoint, asked from several threads."""

    def __init__(
        self, feedback: Any, prompter: Prompter, host: Host, transport: httpx.BaseTransport | None = None
    ) -> None:
        """Checks what can be checked without a request: key and proxy. A test passes its own `transport`."""
        self._cfg = cfg = feedback.server
        super().__init__("server", feedback, cfg.concurrency, host)
        self._prompter = prompter
        self._note_once = functools.cache(host.note)
        self._url = _endpoint(cfg.url or "")
        headers = _headers(cfg)
        self._key = headers.get("Authorization", "").removeprefix("Bearer ")
        self._client = _client(self._url, headers, cfg.timeout, transport)
        self._cache = None if cfg.cache_dir is None else Path(cfg.cache_dir)
        self._asking: dict[str, threading.Lock] = {}
        self._closed = threading.Event()
        self._sent = 0

    def ask(self, problem: Problem, rollout: Rollout) -> str | None:
        """The model's answer, from the cache if it was asked the same before. None once the budget is spent."""
        assert rollout.verdict is not None  # see `asks`
        message = self._prompter.critic_message(problem, rollout.text, rollout.verdict.text, right=rollout.success)
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
        file = None if self._cache is None else self._cache / key[:2] / f"{key}.json"
        with asking:  # the same request from another thread waits for this one's answer
            text = _cached(file)
            if text is None:
                text = self._ask(json.dumps(request).encode())
                if text is not None and file is not None:
                    self._keep(file, {"url": self._url, "request": request, "answer": text})
        return without_thoughts(text or "") or None

    def _ask(self, body: bytes) -> str | None:
        import httpx

        first, most = PAUSES
        for attempt in range(self._cfg.retries + 1):
            if not self._may_ask():
                return None
            wait: float | None = None
            try:
                status, wait, answer = self._post(body)
            except (TimeoutError, httpx.TimeoutException):
                why = f"no answer within {self._cfg.timeout:g} s (feedback.server.timeout)"
            except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:
                why = str(error) or type(error).__name__
            else:
                if status == 200:
                    return self._without_key(_content(answer))
                why = f"status {status}{_detail(answer)}"
                if status != 429 and status < 500:
                    break  # the server would say the same again
            pause = min(most, first * 2.0**attempt if wait is None else wait)
            if attempt < self._cfg.retries and self._closed.wait(pause):
                why = "the run is ending"
                break
        raise SourceError(self._without_key(f"{self._url}: {why}"))

    def _without_key(self, text: str) -> str:
        """The text, which a server wrote and a run keeps, without the key that the server was sent."""
        return text.replace(self._key, "[key]") if len(self._key) >= SECRET else text

    def _post(self, body: bytes) -> tuple[int, float | None, bytes]:
        """One POST: (status, seconds that the server asks us to wait, body of the answer)."""
        answer = b""
        with _Deadline(self._cfg.timeout) as deadline:
            stream = self._client.stream("POST", self._url, content=body, extensions={"trace": deadline.trace})
            try:
                with stream as response:
                    for chunk in response.iter_bytes():
                        answer += chunk
                        deadline.check()
                        if len(answer) > LONGEST:
                            raise OSError(f"an answer of more than {LONGEST >> 20} MB")
            finally:
                deadline.check()
        after = response.headers.get("Retry-After", "")
        wait = float(after) if after.isascii() and after.isdigit() else None
        return response.status_code, wait, self._without_key(answer.decode(errors="replace")).encode()

    def _may_ask(self) -> bool:
        budget = self._cfg.budget_requests
        with self._lock:
            if budget is None or self._sent < budget:
                self._sent += 1
                return True
            key = "feedback.server.budget_requests"
            self._note_once(f"the budget of {budget} requests is spent: the server is not asked again ({key})")
            return False

    def _keep(self, file: Path, row: Mapping[str, Any]) -> None:
        partial = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(row), encoding="utf-8")
            os.replace(partial, file)
        except OSError as error:  # the answer itself is not lost
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            why = f"cannot be written ({error.strerror or error})"
            with self._lock:
                self._note_once(f"{file.parent}: {why}, so answers of the server are not kept")

    def open(self, folder: Path) -> None:
        """Keep answers in the run folder, unless the recipe names another."""
        if self._cache is None:
            self._cache = folder / CACHE

    def close(self) -> None:
        """Make no further attempt."""
        super().close()
        self._closed.set()

    def state(self) -> dict[str, Any]:
        """Requests sent, for the budget."""
        return {"sent": self._sent}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with the budget that is left."""
        self._sent = int(state.get("sent", 0))


def check_reachable(cfg: Any, transport: httpx.BaseTransport | None = None) -> None:
    """One request, before a run loads anything, for the list of models: a dead server is told now, not after the first rollouts.

    A server that has no such list answers too. Where `cache_dir` holds answers, nobody is asked: they may be all that the run
    needs. `cfg` is the recipe's section `feedback`; a test passes its own `transport`.

    Raises:
        SourceError: nobody answers, or the key is refused.
        ConfigError: the key or a proxy is missing or wrong.
    """
    import httpx

    url, own = _endpoint(cfg.server.url or ""), cfg.server
    if own.cache_dir is not None and any(Path(own.cache_dir).glob("*/*.json")):
        return
    seconds = min(PROBE_SECONDS, own.timeout)
    try:
        with _client(url, _headers(own), seconds, transport) as client:
            status = client.get(f"{url.removesuffix('/chat/completions')}/models").status_code
    except httpx.TimeoutException:
        raise SourceError(
            f"feedback.server.url: {url} does not answer within {seconds:g} s; start it, or wait for it"
        ) from None
    except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:
        why = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
        remedy = "start the server, or correct the address"
        raise SourceError(f"feedback.server.url: {url} cannot be reached ({why}); {remedy}") from None
    if status in (401, 403):
        remedy = "set feedback.server.api_key_env, or correct the key"
        raise SourceError(f"feedback.server.url: {url} refuses us (status {status}); {remedy}")


class _Deadline:
    """Ends a request when its time is over. httpx's limits hold for each read: a server may drip headers and body for ever."""

    def __init__(self, seconds: float) -> None:
        self._over = False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def trace(self, name: str, info: Mapping[str, Any]) -> None:
        """Learn the request's socket from httpcore, which tells when it is connected, and when TLS has taken its place."""
        if name.endswith(("connect_tcp.complete", "start_tls.complete")):
            with self._lock:
                self._socket = info["return_value"].get_extra_info("socket")
            if self._over:
                self._end()

    def check(self) -> None:
        """Raise a `TimeoutError` once the time is over."""
        if self._over:
            raise TimeoutError

    def _end(self) -> None:
        self._over = True
        with self._lock, contextlib.suppress(OSError):  # closed already
            if self._socket is not None:
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # wakes the thread that reads from it


def _cached(file: Path | None) -> str | None:
    try:
        text = json.loads(file.read_text(encoding="utf-8"))["answer"] if file is not None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no answer yet, or a damaged file: ask again
    return text if isinstance(text, str) else None


def _headers(cfg: ServerSettings) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "User-Agent": f"vpd-mlx/{__version__}"}
    if cfg.api_key_env is not None:
        key = os.environ.get(cfg.api_key_env, "").strip()
        if not key or not (key.isascii() and key.isprintable()):
            what = f"the environment variable {cfg.api_key_env!r} {'holds no key' if key else 'is not set'}"
            raise config_error("feedback.server.api_key_env", what, "export it, with the key")
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _client(
    url: str, headers: Mapping[str, str], seconds: float, transport: httpx.BaseTransport | None
) -> httpx.Client:
    """Follows no redirects: a redirected POST would arrive as a GET, and the key with it. Uses the environment's proxies, except
    for this machine itself."""
    import httpx  # here, since it takes a while, and few recipes need it

    host = urllib.parse.urlsplit(url).hostname or ""
    local = host == "localhost"
    with contextlib.suppress(ValueError):  # a name, not an address
        local = local or ipaddress.ip_address(host).is_loopback
    # A connection of its own for each request, whose socket `_Deadline` knows.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    try:
        return httpx.Client(headers=headers, timeout=seconds, limits=limits, transport=transport, trust_env=not local)
    except (ImportError, ValueError) as error:
        what = f"a proxy of the environment cannot be used ({str(error).splitlines()[0]})"
        raise config_error("feedback.server.url", what, "correct HTTPS_PROXY and ALL_PROXY, or unset them") from None


def _endpoint(url: str) -> str:
    url = url.rstrip("/")
    if url.endswith("/chat/completions"):
        return url
    return url + ("/chat/completions" if urllib.parse.urlsplit(url).path else "/v1/chat/completions")


def _detail(body: bytes) -> str:
    text = " ".join(body[:2000].decode(errors="replace").split())
    return f" ({text[:160]})" if text else ""


def _content(body: bytes) -> str:
    try:
        text = json.loads(body)["choices"][0]["message"].get("content") or ""
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise SourceError(f"the answer is not a chat completion{_detail(body)}") from None
    if not isinstance(text, str):
        raise SourceError(f"the content of the answer is not text{_detail(body)}")
    return text


SERVER = SourceEntry(
    lambda parts: Server(parts.cfg, parts.prompter, parts.host),
    keys=ServerKeys,
    required=("server.url", "give its address, e.g. http://127.0.0.1:8080/v1"),
    on_success=True,
    needs="a server",
    reach=check_reachable,
)
