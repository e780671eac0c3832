"""Writes a `.tar.gz` whose bytes depend only on its contents, whole or not at all."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import secrets
import tarfile
from collections.abc import Mapping
from pathlib import Path

from qlora_helpers.base.errors import UserError
from qlora_helpers.base.folders import rename


def write_tarball(out_path: Path, contents: Mapping[str, bytes | Path]) -> Path:
    """Writes a `.tar.gz`; the same contents give the same bytes.

    Args:
        out_path: the archive; an old one is replaced when the new one is complete.
        contents: by name in the archive, the bytes or the file that holds them.

    Returns:
        `out_path`.

    Raises:
        UserError: it can't be written; an old archive is intact.
    """
    out_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_path.with_name(f".{out_path.name}.{secrets.token_hex(6)}")
    try:
        # The gzip header gets no file name and no time; TarInfo's defaults have no time and no owner.
        with (
            open(temporary, "xb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for name, source in contents.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(source) if isinstance(source, bytes) else source.stat().st_size
                with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as content:
                    archive.addfile(entry, content)
        rename(temporary, out_path, root=out_path.parent)
    except OSError as error:
        raise UserError(
            f"{out_path.name} could not be written ({error.strerror})", next_step="Free some space and try again."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or never made
            os.unlink(temporary)
    return out_path
