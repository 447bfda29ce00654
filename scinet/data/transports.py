"""How each kind of remote source is opened: http(s) by the standard library, a shell pipe, and fsspec for the rest."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import re
import shlex
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import fsspec
from fsspec.registry import known_implementations

from scinet.data.remote import Opened, RawBytes, RefusedError
from scinet.errors import ConfigError

PIPE = "pipe:"
_FINAL = (400, 401, 403, 405, 410, 451)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)


def is_remote(path: str) -> bool:
    """Return whether a data path is a URL or a pipe; ``file://`` is local."""
    return bool(_SCHEME.match(path)) and not path.lower().startswith("file://")


def join(prefix: str, name: str) -> str:
    """Return the address of a file under a prefix; in a pipe the name is quoted for the shell."""
    if prefix.startswith(PIPE):
        name = shlex.quote(name)
        return prefix.replace("{}", name) if "{}" in prefix else f"{prefix.rstrip('/')}/{name}"
    if is_http(prefix):
        base, mark, query = prefix.partition("?")  # a signature, for instance
        return f"{base.rstrip('/')}/{quote(name)}{mark}{query}"
    return f"{prefix.rstrip('/')}/{name}"


def is_http(url: str) -> bool:
    """Return whether it is ``http://`` or ``https://``."""
    return url.lower().startswith(("http://", "https://"))


def shown(url: str) -> str:
    """Return a URL without the secrets it may carry: user, password, query; a folder or a pipe as it is."""
    if "://" not in url or url.startswith(PIPE):
        return url
    scheme, _, rest = url.partition("://")
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def check(prefix: str, *, allow_pipe: bool) -> None:
    """Check that a data path can be opened at all.

    Raises:
        ConfigError: for a pipe that is not allowed, or a scheme without its driver.
    """
    scheme = prefix.partition(":")[0].lower()
    if prefix.startswith(PIPE):
        if not allow_pipe:
            raise ConfigError(
                f"data.path={prefix} runs a shell command: set data.allow_pipe=true if you trust it, or name a URL"
            )
    elif scheme in ("http", "https"):
        if not is_http(prefix):
            raise ConfigError(f"data.path={shown(prefix)} is no address: it should begin with {scheme}://")
        try:
            urlsplit(prefix)
        except ValueError as error:
            raise ConfigError(f"data.path={shown(prefix)} is no address: {error}") from error
    else:
        known = known_implementations.get(scheme)
        try:
            fsspec.get_filesystem_class(scheme)
        except ValueError as error:
            raise ConfigError(f"data.path={shown(prefix)}: nothing reads '{scheme}://'") from error
        except ImportError as error:
            package = known["class"].partition(".")[0] if known else scheme
            # the drivers within fsspec say themselves what they want
            remedy = f"pip install {package}" if package != "fsspec" else (known or {}).get("err") or error
            raise ConfigError(f"data.path={shown(prefix)}: '{scheme}://' cannot be read here: {remedy}") from error


def opener(url: str) -> Opened:
    """Return what opens an address at an offset."""
    if url.startswith(PIPE):
        return _Pipe(url)
    return _Http(url) if is_http(url) else _Fsspec(url)


class _Http:
    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._user, _, host = parts.netloc.rpartition("@")
        self._url = parts._replace(netloc=host).geturl()

    def __call__(self, offset: int, timeout_s: float) -> tuple[RawBytes, int, int | None]:
        request = urllib.request.Request(self._url, headers={"Accept-Encoding": "identity", "User-Agent": "scinet"})
        if self._user:
            # not on to where a redirect leads
            secret = base64.b64encode(unquote(self._user).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {secret}")
        if offset:
            request.add_header("Range", f"bytes={offset}-")
        try:
            response = _client().open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            error.close()
            kind = RefusedError if error.code in _FINAL else OSError
            raise kind(f"HTTP {error.code} {error.reason}") from None
        except urllib.error.URLError as error:
            raise (error.reason if isinstance(error.reason, OSError) else OSError(str(error.reason))) from None
        except http.client.HTTPException as error:
            raise OSError(f"{type(error).__name__} {error}") from None
        length = response.headers.get("Content-Length", "")
        size = int(length) if length.isdigit() else None
        if response.status != http.client.PARTIAL_CONTENT:
            return _HttpBytes(response), 0, size
        found = re.match(r"bytes (\d+)-\d+/(\d+|\*)$", response.headers.get("Content-Range", ""))
        if not found or int(found[1]) > offset:
            response.close()
            raise OSError("the answer to a Range request does not say where it begins")
        return _HttpBytes(response), int(found[1]), int(found[2]) if found[2] != "*" else None


class _HttpBytes:
    """A response whose broken chunks are errors of reading like any other."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response

    def read(self, size: int, /) -> bytes:
        try:
            return self._response.read1(size)
        except http.client.HTTPException as error:
            raise OSError(f"{type(error).__name__} {error}") from None

    def close(self) -> None:
        self._response.close()


def _client() -> urllib.request.OpenerDirector:
    """A client of http and https alone: no redirect leads to a local file or to FTP."""
    client = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        client.add_handler(handler)
    return client


class _Pipe:
    def __init__(self, url: str) -> None:
        self._command = url.removeprefix(PIPE)

    def __call__(self, offset: int, timeout_s: float) -> tuple[RawBytes, int, int | None]:
        del offset, timeout_s  # a command starts at the beginning
        return _PipeBytes(self._command), 0, None


class _PipeBytes:
    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )

    def read(self, size: int, /) -> bytes:
        assert self._process.stdout is not None
        content = self._process.stdout.read(size)
        if len(content) < size and self._process.wait():
            raise OSError(f"the command ended with status {self._process.returncode}")
        return content

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class _Fsspec:
    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, offset: int, timeout_s: float) -> tuple[RawBytes, int, int | None]:
        del timeout_s  # kept by the caller, who leaves a hanging driver behind
        with _as_os_errors():
            file: Any = fsspec.open(self._url, "rb").open()
            size = getattr(file, "size", None)
            if offset:
                file.seek(offset)
        return _FsspecBytes(file), offset, int(size) if isinstance(size, int) else None


class _FsspecBytes:
    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int, /) -> bytes:
        with _as_os_errors():
            return bytes(self._file.read(size))

    def close(self) -> None:
        with _as_os_errors():
            self._file.close()


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Drivers raise what their clients raise, which has no common base: here all of it is a failed read."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__} {error}") from error
