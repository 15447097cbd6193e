"""Fetch and unpack the official archive of a task: `run.py TASK --data DIR --download`.

A download that broke off goes on where it stopped. What comes is checked against the size and
the SHA-256 where they are known, unpacked beside DIR, and put in its place when all is there.
"""

import hashlib
import os
import shutil
import tempfile
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.error import HTTPError, URLError

from errors import UserError

MIRROR = "https://storage.googleapis.com/cluebenchmark/tasks"
TIMEOUT = 30  # seconds without a byte
PIECE = 1 << 20  # bytes

# What the contents of an archive can raise; RuntimeError: encrypted, or packed as never seen.
BROKEN = (ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)


class Archive(NamedTuple):
    """Name of an archive below the mirror's address, and what is known of it."""

    name: str
    sha256: str | None = None
    size: int | None = None  # bytes


ARCHIVES = {
    "afqmc": Archive("afqmc_public.zip", size=1_195_044),
    "tnews": Archive(
        "tnews_public.zip", "77c476e70cfe0b014a81b84c6e1db2142a8a2f52f4ae0a8216aa75e673933462"
    ),
    "iflytek": Archive("iflytek_public.zip"),
    "cmnli": Archive("cmnli_public.zip"),
    "ocnli": Archive("ocnli_public.zip"),
    "cluewsc2020": Archive("cluewsc2020_public.zip"),
    "csl": Archive(
        "csl_public.zip", "795d1a2e475d59acad8236f6c5baba7a0b43d3e0508cb60f15ffbc76d5f437c4"
    ),
    "cmrc2018": Archive(
        "cmrc2018_public.zip",
        "6c63dc27e728ec5231aeb7d2861b4c90b6c116390582e0c44416cf3edf030b16",
    ),
    "chid": Archive("chid_public.zip"),
    "c3": Archive(
        "c3_public.zip", "20dfa683c57c9795129e22d8dd0c299d6b2a29fbc84758ef2ebdb8b2904d7e12"
    ),
    "cluener": Archive("cluener_public.zip"),
}


def download(task: str, directory: Path, mirror: str = MIRROR) -> None:
    """Put the official files of a task into a directory, unless it has files already.

    Raises:
        UserError: the archive cannot be had, or is not what it should be.
    """
    if directory.is_dir() and any(directory.iterdir()):
        return
    archive = ARCHIVES[task]
    address = f"{mirror.rstrip('/')}/{archive.name}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.parent / f"partial-{archive.name}"
    by_hand = f"download it by other means and unpack it into {directory}, or give a --mirror"
    try:
        _fetch(address, partial)
    except (URLError, HTTPException, TimeoutError, ConnectionError, ValueError) as error:
        raise UserError(
            f"{address}: {error}: try again, which goes on where it stopped; or {by_hand}"
        ) from None
    try:
        _verify(partial, archive)
        _unpack(partial, directory)
    except BROKEN as error:
        partial.unlink()
        raise UserError(f"{address}: {error}: {by_hand}") from None
    partial.unlink()


def _fetch(address: str, partial: Path) -> None:
    """Append to what is there already, where the server can; else begin anew."""
    done = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(
        address, headers={"Range": f"bytes={done}-"} if done else {}
    )
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416:  # nothing after what is there: it is complete
            raise
        return
    with response, partial.open("ab" if response.status == 206 else "wb") as file:
        expected = response.headers.get("Content-Length")
        start = file.tell() if response.status == 206 else 0
        while piece := response.read(PIECE):
            file.write(piece)
        if expected is not None and file.tell() - start < int(expected):
            raise ConnectionError("the connection was closed too early")


def _verify(file: Path, archive: Archive) -> None:
    if archive.size is not None and file.stat().st_size != archive.size:
        raise ValueError(f"has {file.stat().st_size} bytes, not {archive.size}")
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while piece := content.read(PIECE):
            digest.update(piece)
    if archive.sha256 not in (None, digest.hexdigest()):
        raise ValueError(f"has the SHA-256 {digest.hexdigest()}, not {archive.sha256}")


def _unpack(file: Path, directory: Path) -> None:
    """The files of an archive, without the folder that may hold them all."""
    with (
        zipfile.ZipFile(file) as archive,
        tempfile.TemporaryDirectory(dir=directory.parent) as folder,
    ):
        for member in archive.infolist():
            parts = PurePosixPath(member.filename.replace("\\", "/")).parts
            if member.is_dir() or not parts or parts[0] == "__MACOSX":
                continue
            if ".." in parts or member.filename.startswith("/") or ":" in parts[0]:
                raise ValueError(f"has a file outside of itself, {member.filename!r}")
            path = Path(folder, "files", *parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        root = Path(folder, "files")
        root.mkdir(exist_ok=True)
        while len(entries := list(root.iterdir())) == 1 and entries[0].is_dir():
            root = entries[0]
        if not any(root.iterdir()):
            raise ValueError("is empty")
        if directory.is_dir():
            directory.rmdir()  # it is empty
        os.replace(root, directory)
