"""Downloads SAMSum's `corpus.7z`, and reads it without trusting it.

Owns the download and its limits, and which members of an archive are read. An archive is a stranger's file: only the
three expected members are unpacked, into memory. An archive with links, with paths that lead elsewhere or with a
password is refused. Knows nothing of what the members hold.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from qlora_helpers.base.errors import DataError
from qlora_helpers.base.text import brief, size_text

MEMBERS = ("train.json", "val.json", "test.json")
MAX_ARCHIVE_BYTES = 256 * 1024**2  # SAMSum's own takes 3 MB
MAX_EXTRACTED_BYTES = 512 * 1024**2
TIMEOUT_S = 30.0
_CHUNK_BYTES = 64 * 1024
_BY_HAND = "Download it by other means and set data.source to the file."


def read_archive(file: BinaryIO, name: str) -> dict[str, bytes]:
    """Unpacks the members train.json, val.json and test.json, or those of them that are there.

    Args:
        file: the .7z archive, seekable.
        name: its name, for messages.

    Returns:
        The bytes of each member by its name.

    Raises:
        DataError: it is not a complete 7z archive, asks for a password, unpacks to more than `MAX_EXTRACTED_BYTES`, holds
            links or paths that lead out of it, or has none of the three members.
    """
    import py7zr
    from py7zr.exceptions import DecompressionBombError, PasswordRequired

    try:
        with py7zr.SevenZipFile(file, max_extract_size=MAX_EXTRACTED_BYTES) as archive:
            members = _expected_members(archive, name)
            memory = py7zr.io.BytesIOFactory(MAX_EXTRACTED_BYTES)
            archive.extract(targets=members, factory=memory)
    except DataError:
        raise
    except PasswordRequired as error:
        raise DataError(
            f"{name} is encrypted",
            expected="an archive without a password",
            next_step="Unpack it and name a file of it.",
        ) from error
    except DecompressionBombError as error:
        raise DataError(
            f"{name} is over the limit: it unpacks to more than {size_text(MAX_EXTRACTED_BYTES)}",
            next_step="Unpack it by hand if you trust it, and name a file of it.",
        ) from error
    except Exception as error:  # on damaged bytes py7zr raises whatever its parser runs into
        raise DataError(
            f"{name} is not a complete 7z archive: it is truncated or damaged ({brief(error)})",
            next_step="Download or copy it again.",
        ) from error
    return {member: memory.get(member).read() for member in members}


@contextlib.contextmanager
def downloaded(url: str, progress: Callable[..., Any] | None = None) -> Iterator[BinaryIO]:
    """Downloads an archive into a temporary file, which is deleted when the context ends.

    Args:
        url: https:// (http:// only on this machine itself).
        progress: called like `tqdm.tqdm(total=bytes, unit="B", ...)`; None shows nothing.

    Raises:
        DataError: the address can't be reached or answers with an error, or the download breaks off or exceeds
            `MAX_ARCHIVE_BYTES`.
    """
    with tempfile.TemporaryFile() as file:
        _fetch(url, file, progress)
        file.seek(0)
        yield file


def url_name(url: str) -> str:
    """Returns the file's name in an address.

    Raises:
        DataError: it is not an address.
    """
    try:
        return PurePosixPath(urllib.parse.urlsplit(url).path).name
    except ValueError as error:
        raise DataError(f"that is not an address ({brief(error)})", got=repr(url[:100]), next_step=_BY_HAND) from error


def _expected_members(archive: Any, name: str) -> list[str]:
    found: list[str] = []
    for member in archive.files:
        fault = _fault(member)
        if not fault and member.filename in found:
            fault = "is in it twice"
        if fault:
            raise DataError(
                f"{name} can't be trusted: its member {member.filename[:100]!r} {fault}",
                next_step="Download it from the place where it was published.",
            )
        if member.filename in MEMBERS:
            found.append(member.filename)
    if not found:
        raise DataError(
            f"{name} has none of the members that are read",
            expected=" or ".join(MEMBERS),
            got=", ".join(repr(member.filename[:60]) for member in list(archive.files)[:10]) or "an empty archive",
            next_step="For other contents unpack it, and name a .json, .jsonl, .csv or .parquet file.",
        )
    return found


def _fault(member: Any) -> str:
    path = PurePosixPath(member.filename)  # py7zr has turned backslashes into slashes
    if path.is_absolute() or ".." in path.parts or ":" in member.filename:
        return "leads out of the archive"
    if member.is_symlink or member.is_junction or not (member.is_file or member.is_directory):
        return "is a link or not a plain file"
    if member.is_directory and member.filename in MEMBERS:
        return "is a folder"
    return ""


def _require_encrypted(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1")):
        raise DataError(
            f"{url_name(url)} would come over an unencrypted connection",
            expected="an https:// address",
            got=f"{parts.scheme}://",
            next_step=f"Use https. {_BY_HAND}",
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Checks every address before it is asked: a hop that is refused has not been made."""

    max_redirections = 5

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        try:
            _require_encrypted(newurl)
            if _is_inner(newurl) and not _is_inner(req.full_url):
                raise DataError(
                    f"{url_name(req.full_url)} is redirected to an address inside this network",
                    expected="an address on the internet",
                    next_step=_BY_HAND,
                )
        except DataError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_inner(url: str) -> bool:
    """Whether an address is this machine's, or one that only this network reaches, such as a cloud's metadata service."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".local", ".internal"))


def _fetch(url: str, file: BinaryIO, progress: Callable[..., Any] | None) -> None:
    name = url_name(url)
    _require_encrypted(url)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "qlora-helpers"})
        with urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT_S) as response:
            _copy(response, file, name, progress)
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise DataError(
            f"{name} can't be downloaded: the server answered {error.code}", next_step=f"Check the address. {_BY_HAND}"
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = brief(getattr(error, "reason", None) or error)
        raise DataError(
            f"{name} can't be downloaded ({reason})", next_step=f"Is there a network? {_BY_HAND}"
        ) from error


def _copy(response: Any, file: BinaryIO, name: str, progress: Callable[..., Any] | None) -> None:
    declared = int(response.headers.get("Content-Length") or 0)
    done = 0
    bar = progress(total=declared or None, unit="B", unit_scale=True, desc=name) if progress else None
    try:
        while done <= MAX_ARCHIVE_BYTES >= declared and (chunk := response.read(_CHUNK_BYTES)):
            file.write(chunk)
            done += len(chunk)
            if bar is not None:
                bar.update(len(chunk))
    finally:
        if bar is not None:
            bar.close()
    if max(done, declared) > MAX_ARCHIVE_BYTES:
        raise DataError(
            f"{name} is over the limit of {size_text(MAX_ARCHIVE_BYTES)}",
            got=size_text(max(done, declared)),
            next_step="Check the address.",
        )
    if done < declared:
        raise DataError(
            f"{name} broke off after {size_text(done)} of {size_text(declared)}", next_step="Try again in a while."
        )
