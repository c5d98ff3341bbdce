"""Downloads from the Hugging Face hub: bars at a terminal, silence elsewhere, and no waiting for a network that is not there."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

__all__ = ["hub_fault", "reaching_hub"]

PATIENCE = 5.0  # seconds for a connection; the library itself would try for half a minute, for each file


@contextlib.contextmanager
def reaching_hub() -> Iterator[None]:
    """Within the block the hub's library shows its bars at a terminal only, and no retries.

    Where the hub cannot be reached it is told so: what the cache holds is taken at once, and for what it lacks the library's
    own error of offline use is raised.
    """
    from huggingface_hub import constants
    from huggingface_hub import utils as untyped

    hub: Any = untyped
    level, shown, offline = hub.logging.get_verbosity(), not hub.are_progress_bars_disabled(), constants.HF_HUB_OFFLINE
    try:
        hub.logging.set_verbosity_error()
        if not sys.stderr.isatty() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
            hub.disable_progress_bars()
        if not offline and not _reachable(constants.ENDPOINT):
            constants.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        hub.logging.set_verbosity(level)
        if shown and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
            hub.enable_progress_bars()


def hub_fault(error: Exception) -> str:
    """What is wrong, by an error of the hub's library, in a few words and with the remedy."""
    from huggingface_hub import errors

    for kinds, words in (
        (errors.GatedRepoError, "it is gated; accept its terms on its page, then run `hf auth login`"),
        (
            errors.RepositoryNotFoundError,
            "the hub has none of that name, or it is private; check the name, or run `hf auth login`",
        ),
        (errors.RevisionNotFoundError, "it has no such revision; see its page for branches, tags and commits"),
        (
            (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled),
            "it is not in the cache, and the hub cannot be reached; check the name and the network, or give a local path",
        ),
        (errors.EntryNotFoundError, "it has no such file; see its page for its files"),
        (errors.HFValidationError, "a name on the hub is owner/name; give that, or a local folder"),
    ):
        if isinstance(error, kinds):
            return words
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"the hub says: {first}; check the name and the network"


@functools.lru_cache(1)
def _reachable(endpoint: str) -> bool:
    """Whether the hub's address takes connections in time; behind a proxy only a request would tell."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    place, found = urllib.parse.urlsplit(endpoint), threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((place.hostname or "", place.port or 443), PATIENCE).close()
            reached.set()
        found.set()

    reached = threading.Event()
    threading.Thread(target=connect, daemon=True, name="hub").start()  # looking a name up knows no limit of time
    found.wait(PATIENCE)
    return reached.is_set()
