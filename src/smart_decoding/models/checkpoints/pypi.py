"""Wheels of a Python package index, by its simple API: neither pip nor uv need be installed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from smart_decoding.errors import DownloadError

PYPI = "https://pypi.org/simple"
VARIABLES = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")  # of another index
ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
TRIES = 3
TIMEOUT = 30.0  # seconds without a byte
BLOCK = 1 << 20  # bytes
LARGEST_PAGE = 64 << 20  # bytes of a package's list of files
# not every OSError: one of our own writes is no fault of the network
NETWORK = (URLError, ConnectionError, TimeoutError, ssl.SSLError, HTTPException)


def fetch_wheel(
    requirement: str, folder: Path, progress: Callable[[int], object], largest: int
) -> Path:
    """Return the wheel of 'name==version', in `folder`, with the checksum that the index states.

    The index is PyPI, or that of PIP_INDEX_URL, UV_DEFAULT_INDEX or UV_INDEX_URL; PIP_CERT and the
    usual variables name certificates and proxies. pip's and uv's own files are not read.
    progress: is called with bytes as they come. largest: bytes that it may have. Raises
    DownloadError, and OSError where the folder cannot be written to."""
    name, _, version = requirement.partition("==")
    index = next((os.environ[v] for v in VARIABLES if os.environ.get(v)), PYPI)
    page = f"{index.rstrip('/')}/{_normalised(name)}/"
    for left in reversed(range(TRIES)):
        try:
            url, sha256 = _wheel_on(page, name, version)
            return _download(url, page, sha256, folder / _file_name(url), progress, largest)
        except (*NETWORK, ValueError, KeyError) as error:
            missing = getattr(error, "code", 0) == 404 or isinstance(error, KeyError)
            if missing or not left:
                reason = f"{type(error).__name__}: {error}"
                raise DownloadError(
                    f"cannot fetch {requirement} from {_public(page)}: "
                    f"{'it is not there' if missing else reason}; "
                    f"{', '.join(VARIABLES)} name another index"
                ) from error
            time.sleep(0.5 * (TRIES - left))
    raise AssertionError  # the last try returns or raises


def _wheel_on(page: str, name: str, version: str) -> tuple[str, str]:
    """URL and SHA-256 of a version's wheel. Raises KeyError if the index has none."""
    with _open(page, page, ACCEPT) as answer:
        content = answer.read(LARGEST_PAGE)
        kind, base = answer.headers.get_content_type(), answer.geturl()
    beginning = f"{_normalised(name)}-{version}-"
    try:
        files = list(_files_of(content, kind))
    except (TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(f"its page is no package index: {type(error).__name__}") from error
    for file, url, sha256 in files:
        distribution, _, rest = file.partition("-")
        if f"{_normalised(distribution)}-{rest}".startswith(beginning) and file.endswith(".whl"):
            return urljoin(base, url), sha256
    raise KeyError(version)


def _files_of(content: bytes, kind: str) -> Iterator[tuple[str, str, str]]:
    """File name, URL and SHA-256 (empty if unknown) of all files of a page, JSON or HTML."""
    if kind.endswith("json"):
        for file in json.loads(content)["files"]:
            yield str(file["filename"]), str(file["url"]), str(file["hashes"].get("sha256", ""))
        return
    links = _Links()
    links.feed(content.decode())
    for link in links.found:
        url, fragment = urldefrag(link)
        sha256 = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else ""
        yield unquote(_file_name(url)), url, sha256


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """As HTMLParser's."""
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _file_name(url: str) -> str:
    return urlsplit(url).path.rpartition("/")[2]


def _download(
    url: str, page: str, sha256: str, path: Path, progress: Callable[[int], object], largest: int
) -> Path:
    """Raise ValueError for another checksum, DownloadError for more bytes than `largest`, having
    taken back the progress."""
    digest = hashlib.sha256()
    arrived = 0
    try:
        with _open(url, page, "*/*") as answer, path.open("wb") as target:
            while block := answer.read(BLOCK):
                target.write(block)
                digest.update(block)
                arrived += len(block)
                progress(len(block))
                if arrived > largest:
                    raise DownloadError(f"{path.name} exceeds the {largest:,} bytes left for it")
        if sha256 and digest.hexdigest() != sha256:
            raise ValueError(f"{path.name} has another checksum than the index says")
    except BaseException:
        path.unlink(missing_ok=True)
        progress(-arrived)
        raise
    return path


def _open(url: str, page: str, accept: str) -> Any:
    """Return an answer. A name and password in the index's URL, `page`, are sent to its host only,
    by the same scheme and port. Raises DownloadError for certificates that cannot be read."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url} is neither http nor https")
    request = Request(_public(url), headers={"Accept": accept, "User-Agent": "smart-decoding"})
    user = urlsplit(page).netloc.rpartition("@")[0]
    if user and _origin(url) == _origin(page):
        encoded = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    certificates = os.environ.get("PIP_CERT") or None
    try:
        context = ssl.create_default_context(cafile=certificates)
    except OSError as error:
        raise DownloadError(f"PIP_CERT={certificates} cannot be used: {error}") from error
    return urlopen(request, timeout=TIMEOUT, context=context)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _public(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
