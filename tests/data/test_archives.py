"""SAMSum's archive and its look-alikes: real ones made with py7zr, forged ones, and real downloads over loopback."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import random
import struct
import threading
import zlib
from collections.abc import Iterator

import py7zr
import pytest

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.data import archives
from qlora_helpers.data.archives import downloaded, read_archive
from qlora_helpers.data.sources import read_corpus


def rows(count: int, start: int = 0) -> bytes:
    values = [
        {"id": f"r{i}", "dialogue": f"Ana: number {i}?\r\nBo: yes", "summary": f"Bo confirms number {i}."}
        for i in range(start, start + count)
    ]
    return json.dumps(values).encode()


def archive(members: dict[str, bytes], **options) -> bytes:
    buffer = io.BytesIO()
    with py7zr.SevenZipFile(buffer, "w", **options) as file:
        file.set_encoded_header_mode(False)  # plain names, which `renamed` can forge
        for name, data in members.items():
            file.writestr(data, name)
    return buffer.getvalue()


def renamed(data: bytes, old: str, new: str) -> bytes:
    """Forges a member's name, as py7zr itself would not write it, and corrects the checksums over it."""
    assert len(old) == len(new)
    start = 32 + struct.unpack_from("<Q", data, 12)[0]
    header = data[start:].replace(old.encode("utf-16-le"), new.encode("utf-16-le"))
    assert header != data[start:]
    front = data[12:28] + struct.pack("<I", zlib.crc32(header))
    return data[:8] + struct.pack("<I", zlib.crc32(front)) + front + data[32:start] + header


def error_of(data: bytes) -> DataError:
    with pytest.raises(DataError) as caught:
        read_archive(io.BytesIO(data), "corpus.7z")
    assert "corpus.7z" in str(caught.value) and caught.value.next_step
    return caught.value


SAMSUM = {"train.json": rows(20), "val.json": rows(5, 20), "test.json": rows(6, 25)}


def test_the_three_members_are_the_three_splits(tmp_path):
    (tmp_path / "corpus.7z").write_bytes(archive({"readme.txt": b"hello"} | SAMSUM))
    corpus = read_corpus(DataConfig(source=str(tmp_path / "corpus.7z")))
    assert (len(corpus.train), len(corpus.eval), len(corpus.test)) == (20, 5, 6)
    assert corpus.eval[0].where == "corpus.7z/val.json row 1"
    assert corpus.test[0].prompt == "Ana: number 25?\nBo: yes"
    assert "SAMSum's is CC BY-NC-ND 4.0" in corpus.licence
    assert [note.split(": ")[1][:16] for note in corpus.notes] == ["read as dialogue"]


@pytest.mark.parametrize("member", SAMSUM)
def test_a_part_of_the_members_is_enough(tmp_path, member):
    (tmp_path / "part.7z").write_bytes(archive({member: rows(20)}))
    corpus = read_corpus(DataConfig(source=str(tmp_path / "part.7z"), eval_rows=3, test_rows=2))
    assert (len(corpus.train), len(corpus.eval), len(corpus.test)) == (15, 3, 2)
    assert "rows were cut with seed 0" in corpus.notes[1]


def test_nothing_else_is_unpacked_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = archive({"other.json": b"x", "deep/val.json": b"y"} | SAMSUM)
    assert read_archive(io.BytesIO(data), "corpus.7z") == SAMSUM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("members", "piece"),
    [
        ({"val.json": b""}, "corpus.7z/val.json is empty"),
        ({"val.json": b'[{"dialogue":\n}]'}, "corpus.7z/val.json line 2 is not valid JSON"),
        ({"val.json": b"[\n\n\xe9]"}, "corpus.7z/val.json line 3 is not UTF-8"),
        ({"val.json": b'{"train": [], "val": []}'}, "corpus.7z/val.json has splits of its own"),
        ({"val.json": b"[]"}, "corpus.7z/val.json holds no rows"),
        ({"val.json": rows(2)}, "corpus.7z has too few usable rows"),
    ],
)
def test_a_bad_member_is_named(tmp_path, members, piece):
    (tmp_path / "corpus.7z").write_bytes(archive(members))
    with pytest.raises(DataError) as caught:
        read_corpus(DataConfig(source=str(tmp_path / "corpus.7z")))
    assert piece in str(caught.value) and caught.value.next_step


@pytest.mark.parametrize("name", ["../val.jso", "/etc/passw", "..\\val.jso", "C:\\val.jso", "a/../../bb"])
def test_a_member_that_leads_out_is_refused(name):
    plain = "x" * len(name)
    error = error_of(renamed(archive(SAMSUM | {plain: b"x"}), plain, name))
    assert (
        "can't be trusted" in str(error) and repr(name.replace("\\", "/")) in str(error) and "leads out" in str(error)
    )


def test_a_link_is_refused(tmp_path):
    (tmp_path / "train.json").write_bytes(rows(5))
    (tmp_path / "val.json").symlink_to("train.json")
    with py7zr.SevenZipFile(tmp_path / "corpus.7z", "w") as file:
        file.write(tmp_path / "val.json", "val.json")
    assert "is a link or not a plain file" in str(error_of((tmp_path / "corpus.7z").read_bytes()))


def test_a_folder_named_like_a_member_is_refused(tmp_path):
    (tmp_path / "val.json").mkdir()
    with py7zr.SevenZipFile(tmp_path / "corpus.7z", "w") as file:
        file.write(tmp_path / "val.json", "val.json")
    assert "'val.json' is a folder" in str(error_of((tmp_path / "corpus.7z").read_bytes()))


def test_a_repeated_member_is_refused():
    data = renamed(archive({"val.json": rows(5), "vax.json": rows(5)}), "vax.json", "val.json")
    assert "is in it twice" in str(error_of(data))


@pytest.mark.parametrize("header", [True, False])
def test_an_encrypted_archive_is_refused(header):
    buffer = io.BytesIO()
    with py7zr.SevenZipFile(buffer, "w", password="secret", header_encryption=header) as file:
        file.writestr(rows(5), "val.json")
    assert "is encrypted" in str(error_of(buffer.getvalue()))


def test_an_archive_without_the_members_lists_what_it_holds():
    error = error_of(archive({"one.json": b"[]", "\x1btwo": b"x"}))
    assert "train.json or val.json or test.json" in str(error)
    assert "'one.json', '\\x1btwo'" in str(error)


def test_a_bomb_is_refused(monkeypatch):
    data = archive({"val.json": b" " * 3_000_000})
    assert len(data) < 10_000
    monkeypatch.setattr(archives, "MAX_EXTRACTED_BYTES", 2 * 1024**2)
    assert "over the limit: it unpacks to more than 2.0 MiB" in str(error_of(data))


def test_a_bomb_before_the_member_that_is_read_is_refused(monkeypatch):
    """In a solid archive the members before the wanted one have to be unpacked too: they count."""
    data = archive({"first.bin": b" " * 3_000_000, "val.json": rows(5)})
    monkeypatch.setattr(archives, "MAX_EXTRACTED_BYTES", 2 * 1024**2)
    assert "over the limit" in str(error_of(data))


def test_a_bomb_after_the_member_that_is_read_is_not_unpacked(monkeypatch):
    data = archive({"val.json": rows(5), "last.bin": b" " * 3_000_000})
    monkeypatch.setattr(archives, "MAX_EXTRACTED_BYTES", 2 * 1024**2)
    assert read_archive(io.BytesIO(data), "corpus.7z") == {"val.json": rows(5)}


def test_a_file_over_the_limit_is_not_opened(tmp_path, monkeypatch):
    (tmp_path / "corpus.7z").write_bytes(archive(SAMSUM))
    monkeypatch.setattr("qlora_helpers.data.sources.MAX_ARCHIVE_BYTES", 100)
    with pytest.raises(DataError, match=r"corpus.7z is too large"):
        read_corpus(DataConfig(source=str(tmp_path / "corpus.7z")))


def test_a_truncated_archive_is_named_wherever_it_ends():
    data = archive(SAMSUM)
    for end in (1, 6, 20, 32, 40, len(data) // 2, len(data) - 1):
        assert "truncated or damaged" in str(error_of(data[:end]))


def test_damaged_bytes_never_end_in_another_error():
    data = archive(SAMSUM)
    chance = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        try:
            assert read_archive(io.BytesIO(bytes(damaged)), "corpus.7z") == SAMSUM
        except DataError as error:
            assert "corpus.7z" in str(error)
            refused += 1
    assert refused > 100


# downloads


@contextlib.contextmanager
def served(data: bytes, **said) -> Iterator[str]:
    """A server on this machine: `/corpus.7z` gives `data`, `/moved.7z` leads away; `length` is what it declares."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            moved = self.path == "/moved.7z"
            self.send_response(302 if moved else 200 if self.path == "/corpus.7z" else 404)
            if moved:
                self.send_header("Location", said["to"])
            elif said.get("length", 0) is not None:
                self.send_header("Content-Length", str(said.get("length", len(data))))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer((said.get("host", "127.0.0.1"), 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://{server.server_address[0]}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Bar:
    """Records the calls of a progress bar."""

    def __init__(self, **options) -> None:
        self.options, self.done, self.closed = options, 0, False

    def update(self, count: int) -> None:
        self.done += count

    def close(self) -> None:
        self.closed = True


def refusal(url: str) -> DataError:
    with pytest.raises(DataError) as caught:
        read_corpus(DataConfig(source=url))
    assert caught.value.next_step
    return caught.value


@pytest.mark.parametrize("length", ["declared", None])
def test_an_archive_is_downloaded_with_a_progress_bar(length):
    data = archive(SAMSUM)
    bars = []

    def progress(**options):
        bars.append(Bar(**options))
        return bars[-1]

    with served(data, **({} if length else {"length": None})) as address:
        corpus = read_corpus(DataConfig(source=f"{address}/corpus.7z"), progress)
    assert (len(corpus.train), len(corpus.eval), len(corpus.test)) == (20, 5, 6)
    assert corpus.name == "corpus.7z" and corpus.train[0].where == "corpus.7z/train.json row 1"
    assert bars[0].options["total"] == (len(data) if length else None)
    assert bars[0].done == len(data) and bars[0].closed


def test_a_download_that_breaks_off_is_named():
    data = archive(SAMSUM)
    with served(data[:-100], length=len(data)) as address:
        assert "corpus.7z broke off after" in str(refusal(f"{address}/corpus.7z"))
    with served(data[:-100]) as address:
        assert "corpus.7z is not a complete 7z archive: it is truncated" in str(refusal(f"{address}/corpus.7z"))


@pytest.mark.parametrize("length", [10**12, None])
def test_a_download_over_the_limit_is_stopped(monkeypatch, length):
    monkeypatch.setattr(archives, "MAX_ARCHIVE_BYTES", 200_000)
    with (
        served(b"7" * 5_000_000, length=length) as address,
        pytest.raises(DataError) as caught,
        downloaded(f"{address}/corpus.7z"),
    ):
        pass
    assert "corpus.7z is over the limit of 195.3 KiB" in str(caught.value)
    assert ("got 931.3 GiB" if length else "got 256.0 KiB") in str(caught.value)


def test_an_address_that_fails_or_does_not_answer_is_named():
    with served(b"") as address:
        assert "other.7z can't be downloaded: the server answered 404" in str(refusal(f"{address}/other.7z"))
    error = refusal(f"{address}/corpus.7z")  # nobody listens there any more
    assert "corpus.7z can't be downloaded ([Errno 111] Connection refused)" in str(error)
    assert "Download it by other means" in error.next_step


def test_unencrypted_addresses_and_other_files_are_refused():
    assert "expected an https:// address; got http://" in str(refusal("http://example.org/corpus.7z"))
    assert "got ftp://" in str(refusal("ftp://example.org/corpus.7z"))
    assert "got file://" in str(refusal("file:///tmp/corpus.7z"))
    assert "rows.jsonl can't be read from the web" in str(refusal("https://example.org/rows.jsonl"))
    assert "that is not an address" in str(refusal("https://[::1/corpus.7z"))


class Hops(http.server.BaseHTTPRequestHandler):
    """Answers with the redirect that `hops` names for a path, else with an archive, and notes what was asked."""

    hops: dict[str, str] = {}
    asked: list[tuple[str, str]] = []

    def do_GET(self):
        self.asked.append((self.headers["Host"].partition(":")[0], self.path))
        to = self.hops.get(self.path)
        self.send_response(302 if to else 200)
        if to:
            self.send_header("Location", to)
        self.end_headers()
        if not to:
            self.wfile.write(archive(SAMSUM))

    def log_message(self, *args):
        pass


@pytest.fixture
def hops(monkeypatch):
    """Two servers, of this machine and of what counts as another one: yields their addresses and the handler."""
    monkeypatch.setattr(Hops, "hops", {})
    monkeypatch.setattr(Hops, "asked", [])
    servers = [http.server.ThreadingHTTPServer((host, 0), Hops) for host in ("127.0.0.1", "127.0.0.2")]
    threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    yield *(f"http://{server.server_address[0]}:{server.server_address[1]}" for server in servers), Hops
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("target", ["{other}/hop", "{other}/latest/meta-data?action=delete", "ftp://127.0.0.1/x"])
def test_a_redirect_is_checked_before_it_is_followed(hops, target):
    here, other, handler = hops
    handler.hops |= {"/c.7z": target.format(other=other), "/hop": f"{here}/d.7z"}
    assert "would come over an unencrypted connection" in str(refusal(f"{here}/c.7z"))
    assert handler.asked == [("127.0.0.1", "/c.7z")]  # the hop was not made


def test_a_redirect_to_a_file_or_round_in_circles_is_refused(hops):
    here, _, handler = hops
    handler.hops |= {"/c.7z": "file:///etc/passwd", "/round.7z": f"{here}/round.7z"}
    assert "can't be downloaded" in str(refusal(f"{here}/c.7z"))
    assert "can't be downloaded" in str(refusal(f"{here}/round.7z"))
    assert len(handler.asked) < 10


@pytest.mark.parametrize("inner", ["http://127.0.0.1:8888/api", "https://169.254.169.254/latest", "https://10.0.0.7/x"])
def test_an_address_outside_leads_to_none_inside(inner):
    """Such a request would be made by this machine, with what it may reach."""
    import urllib.request

    request = urllib.request.Request("https://example.org/corpus.7z")
    with pytest.raises(DataError, match=r"corpus.7z is redirected to an address inside this network"):
        archives._Redirects().redirect_request(request, io.BytesIO(), 302, "Found", {}, inner)
    further = archives._Redirects().redirect_request(
        request, io.BytesIO(), 302, "Found", {}, "https://cdn.example.org/x"
    )
    assert further.full_url == "https://cdn.example.org/x"


def test_a_redirect_to_an_unencrypted_address_is_refused():
    data = archive(SAMSUM)
    with served(data, host="127.0.0.2") as elsewhere, served(b"", to=f"{elsewhere}/corpus.7z") as address:
        assert "expected an https:// address" in str(refusal(f"{address}/moved.7z"))
    with served(data) as here, served(b"", to=f"{here}/corpus.7z") as address:
        assert len(read_corpus(DataConfig(source=f"{address}/moved.7z")).train) == 20
