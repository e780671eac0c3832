"""Recognises credentials in addresses and texts: settings may hold none, and texts from elsewhere are written without them."""

from __future__ import annotations

import re
from urllib.parse import unquote

_HOST = re.compile(r"(\[[^\]@]*\]|[^:@\\]*)(:\d*)?")  # an authority without user and password
_KEY = re.compile(r"[?&;#]([^?&;#=]*)=")
_SECRET_NAME = (
    r"x-(?:amz|goog)-.*|.*(?:token|secret|passw|passphrase|signature|credential|access_?key).*|.*key|sig|sas|sid|code|auth"
    r"|authorization|pass|pwd|jwt|session"
)
_SECRET_KEY = re.compile(_SECRET_NAME, re.IGNORECASE)
# Tokens that are known by their form: Hugging Face, AWS, GitHub, Slack, OpenAI, Google, JSON web tokens
_TOKEN = re.compile(
    r"(?<![\w-])(?:hf_[A-Za-z0-9]{12,}|(?:AKIA|ASIA)[A-Z0-9]{10,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|xox[abeprs]-[\w-]{10,}|sk-[\w-]{20,}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*)"
)
_ADDRESS = re.compile(r"((?<![a-z0-9+.-])[a-z][a-z0-9+.-]{0,20}://)([^\s\"'<>`]+)", re.IGNORECASE)
_NAMED = re.compile(
    r"(?P<name>(?:token(?![a-z])|secret|password|passwd|passphrase|signature|credential|access_?key|api_?key)[\w-]{0,40}[\"']?"
    r"\s{0,3}[=:]\s{0,3}[\"']?)(?P<value>(?!\[removed\])[^\s\"',;&)}\]]{6,})",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(?P<name>bearer|authorization: basic)\s+[\w.+/=~-]{12,}", re.IGNORECASE)
REMOVED = "[removed]"


def carries_credentials(text: str) -> bool:
    """Whether a text is an address with a user or password, or with a signature, token or key in its query, or holds a token.

    An address inside another address's query counts too. `https://host/file.7z?download=1` carries no credentials.
    """
    whole = unquote(text)
    _, *addresses = whole.split("://")
    hosts = [re.split(r"[/?#]", address, maxsplit=1)[0] for address in addresses]
    keys = [key for address in addresses for key in _KEY.findall(address)]
    has_token = _TOKEN.search(whole) is not None
    return has_token or not all(map(_HOST.fullmatch, hosts)) or any(map(_SECRET_KEY.fullmatch, keys))


def redacted(text: str) -> str:
    """Returns a text from elsewhere without what may be a credential.

    Removed are the query, the user and the password of every address, the values beside names such as `token=`, and tokens that are
    known by their form.
    """
    text = _ADDRESS.sub(lambda found: found[1] + _public_part(found[2]), text)
    text = _NAMED.sub(lambda found: found["name"] + REMOVED, text)
    text = _BEARER.sub(lambda found: f"{found['name']} {REMOVED}", text)
    return _TOKEN.sub(REMOVED, text)


def _public_part(address: str) -> str:
    """Returns what follows `://` without user, password and query; a fragment stays unless it holds a value."""
    before, mark, _ = address.partition("?")
    if not mark and "=" in (parts := address.partition("#"))[2]:
        before, mark = parts[0], "#"
    host, slash, path = before.partition("/")
    if "@" in before:  # a password may hold a slash
        host, slash, path = (REMOVED + "@" + before.rpartition("@")[2]).partition("/")
    return host + slash + path + (mark + REMOVED if mark else "")
