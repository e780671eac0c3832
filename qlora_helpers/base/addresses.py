"""Recognises addresses that carry credentials, which must not be written into a run's files."""

from __future__ import annotations

import re
from urllib.parse import unquote

_HOST = re.compile(r"(\[[^\]@]*\]|[^:@\\]*)(:\d*)?")  # an authority without user and password
_KEY = re.compile(r"[?&;#]([^?&;#=]*)=")
_SECRET_KEY = re.compile(
    r"x-(amz|goog)-.*|.*(token|secret|passw|signature|credential|access_?key).*|.*key|sig|auth|authorization|pwd|jwt",
    re.IGNORECASE,
)


def carries_credentials(text: str) -> bool:
    """Whether a text is an address with a user or password, or with a signature, token or key in its query.

    An address inside another address's query counts too. `https://host/file.7z?download=1` carries no credentials.
    """
    _, *addresses = unquote(text).split("://")
    hosts = [re.split(r"[/?#]", address, maxsplit=1)[0] for address in addresses]
    keys = [key for address in addresses for key in _KEY.findall(address)]
    return not all(map(_HOST.fullmatch, hosts)) or any(map(_SECRET_KEY.fullmatch, keys))
