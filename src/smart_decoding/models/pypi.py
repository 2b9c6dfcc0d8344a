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
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from smart_decoding.errors import DownloadError

PYPI = "https://pypi.org/simple"
VARIABLES = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")  # of another index
ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
TRIES = 3
TIMEOUT = 30.0  # seconds without a byte
BLOCK = 1 << 20  # bytes


def fetch_wheel(requirement: str, folder: Path, progress: Callable[[int], object]) -> Path:
    """The wheel of 'name==version', in `folder`, with the checksum that the index tells.

    Proxies and certificates are those of the environment, as for pip. progress: is called with
    bytes as they come. Raises DownloadError."""
    name, _, version = requirement.partition("==")
    index = next((os.environ[v] for v in VARIABLES if os.environ.get(v)), PYPI)
    page = f"{index.rstrip('/')}/{_normalised(name)}/"
    for left in reversed(range(TRIES)):
        try:
            url, sha256 = _wheel_on(page, name, version)
            return _download(url, page, sha256, folder, progress)
        except (OSError, HTTPException, ValueError, KeyError) as error:
            missing = getattr(error, "code", 0) == 404 or isinstance(error, KeyError)
            if missing or not left:
                reason = f"{type(error).__name__}: {error}"
                raise DownloadError(
                    f"cannot fetch {requirement} from {_public(page)}: "
                    f"{'it is not there' if missing else reason}"
                ) from error
            time.sleep(0.5 * (TRIES - left))
    raise AssertionError  # the last try returns or raises


def _wheel_on(page: str, name: str, version: str) -> tuple[str, str]:
    """URL and SHA-256 of a version's wheel. Raises KeyError if the index has none."""
    with _open(page, page, ACCEPT) as answer:
        content, kind, base = answer.read(), answer.headers.get_content_type(), answer.geturl()
    beginning = f"{_normalised(name)}-{version}-"
    for file, url, sha256 in _files_of(content, kind):
        distribution, _, rest = file.partition("-")
        if f"{_normalised(distribution)}-{rest}".startswith(beginning) and file.endswith(".whl"):
            return urljoin(base, url), sha256
    raise KeyError(version)


def _files_of(content: bytes, kind: str) -> Iterator[tuple[str, str, str]]:
    """File name, URL and SHA-256 (empty if unknown) of all files of a page, JSON or HTML."""
    if kind.endswith("json"):
        for file in json.loads(content)["files"]:
            yield file["filename"], file["url"], file["hashes"].get("sha256", "")
        return
    links = _Links()
    links.feed(content.decode())
    for link in links.found:
        url, fragment = urldefrag(link)
        sha256 = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else ""
        yield unquote(urlsplit(url).path.rpartition("/")[2]), url, sha256


class _Links(HTMLParser):
    """The links of an index that knows no JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """As HTMLParser's."""
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _download(
    url: str, page: str, sha256: str, folder: Path, progress: Callable[[int], object]
) -> Path:
    """Raises ValueError for another checksum, having taken back the progress."""
    path = folder / urlsplit(url).path.rpartition("/")[2]
    digest = hashlib.sha256()
    arrived = 0
    try:
        with _open(url, page, "*/*") as answer, path.open("wb") as target:
            while block := answer.read(BLOCK):
                target.write(block)
                digest.update(block)
                arrived += len(block)
                progress(len(block))
        if sha256 and digest.hexdigest() != sha256:
            raise ValueError(f"{path.name} has another checksum than the index says")
    except BaseException:
        path.unlink(missing_ok=True)
        progress(-arrived)
        raise
    return path


def _open(url: str, page: str, accept: str) -> Any:
    """An answer. A name and password in the index's URL, `page`, are sent to its host only."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url} is neither http nor https")
    request = Request(_public(url), headers={"Accept": accept, "User-Agent": "smart-decoding"})
    user = urlsplit(page).netloc.rpartition("@")[0]
    if user and urlsplit(url).hostname == urlsplit(page).hostname:
        encoded = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or None)
    return urlopen(request, timeout=TIMEOUT, context=context)


def _public(url: str) -> str:
    """Without name and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
