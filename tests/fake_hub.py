"""A hub on this machine: enough of its HTTP API to fetch a data set or a model, or to be refused."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40
_RESOLVE = re.compile(r"(/datasets)?/(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)")
_API = re.compile(
    r"/api/(datasets|models)/(?P<repo>[^/]+/[^/]+)(/(?P<call>tree|paths-info|revision)/[^/]+)?(/(?P<folder>.+))?"
)


@contextlib.contextmanager
def hub(repositories: dict[str, dict[str, bytes]], gated: tuple[str, ...] = ()) -> Iterator[str]:
    """Serves data sets or models given as files by path; yields the endpoint. Ids in `gated` are refused, others are unknown."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            match = _RESOLVE.fullmatch(path) or _API.fullmatch(path)
            repo = match["repo"] if match else ""
            if repo not in repositories:
                code, error = (403, "GatedRepo") if repo in gated else (404, "RepoNotFound")
                return self.reply(code, b"{}", {"X-Error-Code": error})
            files = repositories[repo]
            if path.startswith("/api/"):
                return self.reply(200, json.dumps(answer(match, files, body.decode())).encode(), {})
            if match["file"] not in files:
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            data = files[match["file"]]
            return self.reply(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_POST = do_GET

        def reply(self, code: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for key, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    def answer(match: re.Match, files: dict[str, bytes], body: str) -> object:
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]
        if match["call"] == "tree":
            return [entry for entry in entries if not match["folder"]]
        if match["call"] == "paths-info":
            return [entry for entry in entries if entry["path"] in body]
        siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
        return {"id": match["repo"], "sha": COMMIT, "siblings": siblings}

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def writable_hub(refuse: int | None = None) -> Iterator[tuple[str, dict]]:
    """A hub that takes one commit; yields the endpoint and what it was sent: `created`, `files` and `authorizations`.

    With `refuse`, an HTTP code, it takes nothing.
    """
    taken: dict = {"created": None, "files": {}, "authorizations": set()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            taken["authorizations"].add(self.headers.get("Authorization"))
            path = urlsplit(self.path).path
            if refuse:
                return self.reply(refuse, {"error": "no"})
            if path == "/api/repos/create":
                taken["created"] = json.loads(body)
                return self.reply(200, {"url": f"http://{self.headers['Host']}/someone/mine", "id": "someone/mine"})
            if path == "/api/validate-yaml":
                return self.reply(200, {"errors": [], "warnings": []})
            if "/preupload/" in path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                return self.reply(200, {"files": files})
            if "/commit/" in path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        taken["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                host = self.headers["Host"]
                return self.reply(
                    200, {"commitUrl": f"http://{host}/someone/mine/commit/{COMMIT}", "commitOid": COMMIT}
                )
            return self.reply(404, {})

        def do_GET(self) -> None:
            if (
                self.path != "/api/agent-harnesses"
            ):  # huggingface_hub asks for this list once a process, without a token
                taken["authorizations"].add(self.headers.get("Authorization"))
            info = {"id": "someone/mine", "sha": COMMIT, "siblings": [], "name": "someone", "type": "user"}
            self.reply(200, [] if "/tree/" in self.path else info)

        def reply(self, code: int, value: object) -> None:
            data = json.dumps(value).encode()
            self.send_response(code)
            for key, text in {"Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
                self.send_header(key, text)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", taken
    finally:
        server.shutdown()
        server.server_close()
