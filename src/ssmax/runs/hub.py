"""Names on a hub: which names are possible, how its client behaves without a network, and which errors are temporary."""

import re
import socket
import textwrap
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

CLIENTS = {"aiohttp", "fsspec", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3"}


def is_hub_name(name: str) -> bool:
    """Return whether a hub could have this name. If not, it is a mistyped path, which is reported without asking the hub."""
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is None or re.search(r"--|\.\.", name):
        return False
    return "/" not in name or not Path(name).parent.is_dir()  # in an existing folder, a file is meant


def cached_only_offline() -> None:
    """Restrict the hub's client to its cache if there is no network. Otherwise it would retry for a minute."""
    from huggingface_hub import constants

    if urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def may_pass(error: BaseException) -> bool:
    """Return whether an error came from the network, so that the same command may succeed later."""
    return any(
        isinstance(cause, ConnectionError | TimeoutError) or type(cause).__module__.partition(".")[0] in CLIENTS
        for cause in _causes(error)
    )


def reason(error: BaseException) -> str:
    """Return an error's message in one line."""
    return textwrap.shorten(str(error), 400) or type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
