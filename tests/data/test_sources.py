"""Every source a run may name, read for real: the embedded corpus, files of each format, a hub; and bad files."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from fake_hub import hub

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.data import compressed
from qlora_helpers.data.sources import read_corpus


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"id": f"r{i}", "dialogue": f"Ana: number {i}?\nBo: yes", "summary": f"Bo confirms number {i}."}
        for i in range(start, start + count)
    ]


def jsonl(values: list) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def corpus_of(path: Path, data: bytes, **settings):
    path.write_bytes(data)
    return read_corpus(DataConfig(source=str(path), **settings))


def error_of(path: Path, data: bytes, **settings) -> DataError:
    with pytest.raises(DataError) as caught:
        corpus_of(path, data, **settings)
    return caught.value


def all_rows(corpus) -> list:
    return [*corpus.train, *corpus.eval, *corpus.test]


# what can be read


def test_the_embedded_corpus_has_its_splits_and_unique_ids():
    corpus = read_corpus(DataConfig())
    assert (len(corpus.train), len(corpus.eval), len(corpus.test)) == (240, 30, 30)
    assert len({row.id for row in all_rows(corpus)}) == 300
    assert corpus.licence == "CC0-1.0"
    assert corpus.notes == ()  # no duplicate, nothing empty, no control characters


def test_the_tickets_are_three_tasks():
    replies = read_corpus(DataConfig(source="embedded:tickets", eval_rows=None, test_rows=None))
    assert (len(replies.train), len(replies.eval), len(replies.test)) == (240, 30, 30)
    assert all(row.answer.endswith("Nora, Fernweg Support") for row in replies.train)
    assert replies.licence == "CC0-1.0" and not any("skipped" in note for note in replies.notes)
    asked = {"source": "embedded:tickets", "prompt": "Name the queue.\n\n{subject}\n{body}"}
    labels = {row.answer for row in read_corpus(DataConfig(**asked, answer="{label}")).train}
    assert labels == {"returns", "delivery", "billing", "warranty", "technical", "account", "praise"}
    fields = [json.loads(row.answer) for row in read_corpus(DataConfig(**asked, answer="{fields}")).train]
    assert all(set(found) == {"order_number", "product", "issue", "wants", "deadline"} for found in fields)
    assert any(found["deadline"] is None for found in fields)


def parquet(values: list[dict]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), sink)
    return sink.getvalue().to_pybytes()


def csv_file(values: list[dict]) -> bytes:
    lines = ["id,dialogue,summary"] + [f'{v["id"]},"{v["dialogue"]}",{v["summary"]}' for v in values]
    return ("\r\n".join(lines) + "\r\n").encode()


FORMATS = {
    "list.json": lambda values: json.dumps(values).encode(),
    "data.json": lambda values: json.dumps({"data": values, "version": 1}).encode(),
    "bom.json": lambda values: b"\xef\xbb\xbf" + json.dumps(values, indent=1).encode(),
    "rows.jsonl": jsonl,
    "bom.jsonl": lambda values: b"\xef\xbb\xbf" + jsonl(values),
    "ROWS.JSONL": jsonl,
    "rows.csv": csv_file,
    "bom.csv": lambda values: b"\xef\xbb\xbf" + csv_file(values),
    "rows.parquet": parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_same_dialogues(tmp_path, name):
    corpus = corpus_of(tmp_path / name, FORMATS[name](rows(40)), eval_rows=4, test_rows=6)
    assert (len(corpus.train), len(corpus.eval), len(corpus.test)) == (30, 4, 6)
    assert {(row.id, row.prompt, row.answer) for row in all_rows(corpus)} == {
        (row["id"], row["dialogue"], row["summary"]) for row in rows(40)
    }
    assert corpus.name == name
    assert all(row.where.startswith(f"{name} ") for row in all_rows(corpus))


def test_where_is_the_line_on_which_a_row_begins(tmp_path):
    corpus = corpus_of(tmp_path / "a.jsonl", b"\n" + jsonl(rows(10)))
    assert {row.id: row.where for row in all_rows(corpus)}["r3"] == "a.jsonl line 5"
    corpus = corpus_of(tmp_path / "a.csv", csv_file(rows(10)))  # each row spans two lines, after a header
    assert {row.id: row.where for row in all_rows(corpus)}["r3"] == "a.csv line 8"


def test_a_line_separator_within_a_text_does_not_end_the_line(tmp_path):
    values = [row | {"dialogue": row["dialogue"] + "\u2028\x85end"} for row in rows(5)]
    data = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
    wanted = {value["dialogue"].replace("\x85", "") for value in values}  # which is a control character
    assert {row.prompt for row in all_rows(corpus_of(tmp_path / "a.jsonl", data))} == wanted


def test_json_with_its_own_splits_keeps_them(tmp_path):
    data = {"train": rows(8), "dev": rows(3, 8), "test": rows(4, 11), "extra": rows(2, 15), "version": "1"}
    corpus = corpus_of(tmp_path / "s.json", json.dumps(data).encode(), eval_rows=None, test_rows=2)
    assert [row.id for row in corpus.train] == [f"r{i}" for i in range(8)]
    assert [row.id for row in corpus.eval] == ["r8", "r9", "r10"]
    assert len(corpus.test) == 2 and {row.id for row in corpus.test} < {"r11", "r12", "r13", "r14"}
    assert corpus.eval[0].where == "s.json dev row 1"
    assert any("'extra'" in note for note in corpus.notes) and any("'version'" in note for note in corpus.notes)


def test_columns_are_mapped(tmp_path):
    values = [{"Chat": row["dialogue"], "gist of it": row["summary"], "other": 1} for row in rows(9)]
    error = error_of(tmp_path / "c.jsonl", jsonl(values), dialogue_column="chat", summary_column="gist")
    assert "no column 'chat' or 'gist'" in str(error)
    assert "'Chat', 'gist of it', 'other'" in str(error)
    assert "--set data.dialogue_column=Chat --set data.summary_column='gist of it'" in error.next_step
    corpus = corpus_of(tmp_path / "c.jsonl", jsonl(values), dialogue_column="Chat", summary_column="gist of it")
    assert {row.answer for row in all_rows(corpus)} == {row["summary"] for row in rows(9)}
    assert corpus.train[0].id == corpus.train[0].where  # a row without an id is called by its place


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_missing_column_lists_those_of_a_table(tmp_path, name):
    error = error_of(tmp_path / name, FORMATS["rows" + Path(name).suffix](rows(9)), summary_column="highlights")
    assert "'id', 'dialogue', 'summary'" in str(error)
    assert "--set data.summary_column=" in error.next_step


def test_parquet_columns_that_are_not_needed_are_not_read(tmp_path):
    year_one_million = pyarrow.array([2**62] * 9, pyarrow.timestamp("ms"))  # no datetime can hold it
    table = pyarrow.Table.from_pylist(rows(9)).append_column("at", year_one_million)
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert len(all_rows(read_corpus(DataConfig(source=str(tmp_path / "t.parquet"))))) == 9


def test_a_repr_is_short_and_shows_no_folder(tmp_path):
    corpus = corpus_of(tmp_path / "a.jsonl", jsonl(rows(20)))
    assert repr(corpus) == "Corpus('a.jsonl': 10 train, 5 eval, 5 test; licence: not stated (a local file); 3 notes)"
    assert not any(str(tmp_path) in text for text in (*corpus.notes, *(row.where for row in corpus.train)))


# what can't

DEEP = b'{"dialogue": ' + b"[" * 100_000 + b"]" * 100_000 + b', "summary": "s"}'
GOOD = jsonl(rows(3))
CSV = b"dialogue,summary\nAna: hi,Ana greets.\n"
BAD = {
    "empty json": ("a.json", b"", "is empty"),
    "empty jsonl": ("a.jsonl", b"", "is empty"),
    "empty csv": ("a.csv", b"", "is empty"),
    "empty parquet": ("a.parquet", b"", "is empty"),
    "empty archive": ("a.7z", b"", "is empty"),
    "blank lines alone": ("a.jsonl", b"\n \n\n", "holds no rows"),
    "byte order mark alone": ("a.json", b"\xef\xbb\xbf", "line 1", "not valid JSON"),
    "header alone": ("a.csv", b"dialogue,summary\n", "holds no rows"),
    "empty list": ("a.json", b"[]", "holds no rows", "empty list"),
    "a number": ("a.json", b"17", "holds no rows", "a single int"),
    "an object without rows": ("a.json", b'{"rows": [], "x": 1}', "'rows', 'x'", "train, val and test"),
    "a split that is no list": ("a.json", b'{"train": {"a": 1}}', "'train' without a list"),
    "cut off json": ("a.json", b'[{"dialogue": "a",\n "summ', "line 2", "not valid JSON", "column 2"),
    "jsonl called txt": ("a.txt", GOOD, "holds JSON", ".jsonl"),
    "broken jsonl called json": ("a.json", GOOD + b"{,}", "line 4", "not valid JSON"),
    "a pointer of git lfs": (
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "git lfs pull",
    ),
    "a page of html": ("a.csv", b"\n<!DOCTYPE html><html>404</html>", "page of HTML", "download the file anew"),
    "gzip called jsonl": ("a.jsonl", gzip.compress(GOOD), "a gzip file", ".gz"),
    "a zip called csv": ("a.csv", b"PK\x03\x04" + b"\0" * 30, "zip archive", ".xlsx"),
    "parquet called json": ("a.json", b"PAR1\x15\x04\x15\x00", "a Parquet file", ".parquet"),
    "a pdf called csv": ("a.csv", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n\0", "a PDF"),
    "no header": (
        "a.csv",
        b"".join(b"how many boxes are in order %d?,there are %d of them\n" % (i, i) for i in range(9)),
        "looks like a row",
    ),
    "no header above labels": (
        "a.csv",
        b"".join(b"order %d,%s\n" % (i, (b"odd", b"even")[i % 2]) for i in range(9)),
        "looks like a row",
    ),
    "json called jsonl": ("a.jsonl", json.dumps(rows(3), indent=1).encode(), "line 1", ".json file"),
    "broken line": ("a.jsonl", GOOD + b'{"dialogue": }\n', "line 4", "not valid JSON", "column 14"),
    "cut off jsonl": ("a.jsonl", GOOD[:-20], "line 3", "not valid JSON"),
    "nested too deep, jsonl": ("a.jsonl", GOOD + DEEP, "line 4", "nested too deep"),
    "nested too deep, json": ("a.json", b"[" + DEEP + b"]", "nested too deep"),
    "endless number": ("a.jsonl", b'{"dialogue": ' + b"9" * 5000 + b"}", "line 1", "4300 digits"),
    "latin-1 jsonl": ("a.jsonl", GOOD + b'{"dialogue": "caf\xe9"}', "line 4", f"0xe9 at {len(GOOD) + 17}", "UTF-8"),
    "latin-1 json": ("a.json", b'[{"dialogue":\n"caf\xe9"}]', "line 2", "0xe9 at 18", "UTF-8"),
    "utf-8 but for a byte": ("a.csv", CSV + "Zoë,über\n".encode() + b"caf\xe9,x\n", "line 4", "0xe9 at", "UTF-8"),
    "latin-1 after a mark": ("a.json", b"\xef\xbb\xbf[\n\xe9]", "line 2", "0xe9 at 5"),
    "utf-16 without rows": ("a.csv", "dialogue,summary\n".encode("utf-16"), "holds no rows"),
    "cut off utf-16": ("a.csv", "dialogue,summary\na,b\n".encode("utf-16")[:-1], "line 2", "not utf-16"),
    "NUL in json": ("a.json", b'[\n{"a": "\0"}]', "line 2", "NUL byte (byte 9)"),
    "NUL in jsonl": ("a.jsonl", GOOD + b"\0", "line 4", f"NUL byte (byte {len(GOOD)})"),
    "NUL in csv": ("a.csv", CSV + b"a\0,b\n", "line 3", "NUL byte"),
    "endless line": ("a.jsonl", GOOD + b'"' + b"x" * 10 * 1024**2, "line 4", "too long", "10.0 MiB"),
    "endless csv line": ("a.csv", CSV + b"x" * (10 * 1024**2 + 1), "line 3", "too long"),
    "too many fields": ("a.csv", CSV + b"Ana: hi, Bo,x\n", "line 3", "wrong number", "got 3", "double quotes"),
    "too few fields": ("a.csv", b'dialogue,summary\n"a\nb",c\nd\n', "line 4", "wrong number of fields", "got 1"),
    "endless field": ("a.csv", CSV + b'"' + b"x\n" * 5_300_000 + b'",y\n', "line 3", "too long", "10.0 MiB"),
    "unclosed quote": ("a.csv", CSV + b'"Ana: hi,x\ny,z\n', "line 3", "not valid CSV", "quote"),
    "text after a quote": ("a.csv", CSV + b'"Ana" says hi,x\n', "line 3", "not valid CSV"),
    "old line ends": ("a.csv", b"dialogue,summary\ra,b\r", "line 1", "not valid CSV"),
    "repeated column": ("a.csv", b"dialogue,summary,summary\na,b,c\n", "line 1", "'summary' repeated"),
    "empty header": ("a.csv", b"\ndialogue,summary\na,b\n", "line 1", "not a header"),
    "two separators": ("a.csv", b"a,b;c,d\n1,2;3,4\n", "in several ways", "data.separator=';'"),
    "no parquet": ("a.parquet", GOOD, "not a complete Parquet file"),
    "cut off parquet": ("a.parquet", parquet(rows(9))[:-30], "not a complete Parquet file"),
    "parquet that is no text": ("a.parquet", parquet([{"dialogue": 1, "summary": "s"}]), "row 1", "not text but int"),
    "no archive": ("a.7z", GOOD, "truncated or damaged"),
    "too few rows": ("a.jsonl", jsonl(rows(2)), "too few usable rows", "at least 3", "got 2"),
    "lists for rows": ("a.jsonl", b'["a", "b"]\n' * 4, "line 1: skipped, not an object with columns but list"),
    "nothing but empty texts": ("a.jsonl", jsonl([{"dialogue": " ", "summary": "s"}] * 9), "line 1", "is empty"),
    "one dialogue alone": ("a.jsonl", jsonl([rows(1)[0] | {"summary": f"{i}"} for i in range(9)]), "in test too"),
    "of another kind": ("a.yaml", GOOD, "unknown kind", ".jsonl"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_file_the_line_and_what_to_do(tmp_path, case):
    name, data, *pieces = BAD[case]
    error = error_of(tmp_path / name, data)
    assert name in str(error)
    assert error.next_step and error.next_step in str(error)
    for piece in pieces:
        assert piece in str(error)
    assert str(tmp_path) not in str(error)
    assert all(char.isprintable() or char == "\n" for char in str(error))


def test_bad_input_comes_in_many_kinds():
    assert len(BAD) >= 40


def test_a_file_over_the_limit_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "huge.jsonl", "wb") as file:
        file.truncate(compressed.MAX_FILE_BYTES + 1)  # sparse: takes no disk space
    with pytest.raises(DataError, match=r"huge.jsonl is too large .* 2.0 GiB at most"):
        read_corpus(DataConfig(source=str(tmp_path / "huge.jsonl")))


def test_a_file_of_the_limit_is_opened(tmp_path):
    (tmp_path / "five.jsonl").write_bytes(b"12345")
    compressed.open_file(tmp_path / "five.jsonl", 5).close()
    with pytest.raises(DataError, match="too large"):
        compressed.open_file(tmp_path / "five.jsonl", 4)


def test_parquet_values_over_the_limit_are_refused(tmp_path, monkeypatch):
    data = parquet([row | {"dialogue": "x" * 10_000 + row["id"]} for row in rows(50)])
    assert len(data) < 200_000  # packed well: the file's own size does not give it away
    monkeypatch.setattr(compressed, "MAX_FILE_BYTES", 200_000)
    assert "a.parquet is too large" in str(error_of(tmp_path / "a.parquet", data))


def test_other_things_than_plain_files_are_refused(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, problem in (("folder.jsonl", "is a folder"), ("pipe.jsonl", "not a plain file"), ("", "is a folder")):
        with pytest.raises(DataError, match=problem):
            read_corpus(DataConfig(source=str(tmp_path / name)))


def test_no_such_file_says_what_is_there(tmp_path, monkeypatch):
    (tmp_path / "mine.jsonl").write_bytes(GOOD)
    monkeypatch.chdir(tmp_path)
    for source in ("min.jsonl", "./min.jsonl", "./min", f"{tmp_path}/min.jsonl"):
        with pytest.raises(DataError, match="no such file") as caught:
            read_corpus(DataConfig(source=source))
        assert "'mine.jsonl'" in caught.value.next_step
    with pytest.raises(DataError, match="no folder 'nowhere'"):
        read_corpus(DataConfig(source="nowhere/mine.jsonl"))
    for source in ("~nobody-of-that-name/a.jsonl", "x" * 5000 + ".jsonl", "a b c", "a/b/c", "notes.txt", "../up"):
        with pytest.raises(DataError, match=r"no such file|not a usable path"):
            read_corpus(DataConfig(source=source))


# the hub

READ = """
import json, sys
from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.data.sources import read_corpus
answers = []
for source, column, *settings in json.loads(sys.argv[1]):
    try:
        corpus = read_corpus(DataConfig(source=source, summary_column=column, **dict(*settings)))
        answers.append({"repr": repr(corpus), "notes": corpus.notes, "where": corpus.test[0].where})
    except DataError as error:
        answers.append({"error": str(error)})
print(json.dumps(answers))
"""


def read_in_a_process(sources: list[tuple[str, str]], **environment: str) -> list[dict]:
    """In a process of its own: `datasets` reads the hub's address and cache from the environment at import."""
    result = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(sources)],
        env={key: value for key, value in os.environ.items() if not key.startswith("HF_")} | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return json.loads(result.stdout)


def test_hub_data_sets_are_read_refused_and_found_in_the_cache(tmp_path):
    samsum = {
        "README.md": b"# SAMSum\n",
        "train.jsonl": jsonl(rows(20)),
        "validation.jsonl": jsonl(rows(5, 20)),
        "test.jsonl": jsonl(rows(6, 25)),
    }
    repositories = {
        "knkarthick/samsum": samsum,
        "some/script": {"script.py": b"print()"},
        "some/text": {"README.md": b"nothing here"},
        "some/broken": {"train.jsonl": b'{"dialogue": \n'},
    }
    asked = [
        "samsum",
        "Samsung/samsum",
        "some/script",
        "some/text",
        "some/broken",
        "some/closed",
        "gated/unknown",
    ]
    with hub(repositories, gated=("some/closed",)) as endpoint:
        answers = read_in_a_process(
            [*((source, "summary") for source in asked), ("samsum", "highlights")],
            HF_ENDPOINT=endpoint,
            HF_HOME=str(tmp_path),
        )
    read = "Corpus('knkarthick/samsum': 20 train, 5 eval, 6 test; licence: CC BY-NC-ND 4.0; 2 notes)"
    for answer, source in zip(answers, asked[:2], strict=False):
        assert answer["repr"] == read
        assert answer["notes"][0].startswith(f"{source} is a loading script")
        assert answer["where"] == "knkarthick/samsum test row 1"
    errors = [answer["error"] for answer in answers[2:]]
    expected = [
        "scripts are no longer supported",
        "no data files",
        "can't be read (JSON parse error",
        "'some/closed' is gated. Accept its terms",
        "no data set 'gated/unknown', or it is private",
    ]
    for error, piece in zip(errors, expected, strict=False):
        assert piece in error and "To do without, set data.source to embedded" in error
        assert str(tmp_path) not in error
    assert "has no column 'highlights'; got the columns 'id', 'dialogue', 'summary'" in errors[-1]

    answers = read_in_a_process(
        [("samsum", "summary"), ("some/other", "summary")], HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)
    )
    assert answers[0]["repr"] == read
    assert "'some/other' can't be reached, and no copy is in the cache" in answers[1]["error"]
    assert "To do without, set data.source to embedded" in answers[1]["error"]


def test_a_configuration_and_a_split_of_a_hub_data_set_are_chosen(tmp_path):
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train_sft\n    path: {name}-sft.jsonl\n"
        f"  - split: extra\n    path: {name}-extra.jsonl\n"
        for name in ("de", "en")
    )
    files = {"README.md": (card + "---\n").encode()}
    for start, name in ((0, "de"), (100, "en")):
        files |= {f"{name}-sft.jsonl": jsonl(rows(20, start)), f"{name}-extra.jsonl": jsonl(rows(5, start + 50))}
    with hub({"some/chats": files}) as endpoint:
        answers = read_in_a_process(
            [
                ("some/chats", "summary", {}),
                ("some/chats", "summary", {"hub_config": "fr"}),
                ("some/chats", "summary", {"hub_config": "en", "hub_split": "train"}),
                (
                    "some/chats",
                    "summary",
                    {"hub_config": "en", "hub_split": "train_sft", "eval_rows": 2, "test_rows": 2},
                ),
            ],
            HF_ENDPOINT=endpoint,
            HF_HOME=str(tmp_path),
        )
    several, unknown, no_split, read = answers
    assert "'some/chats' has several configurations; expected 'de', 'en'. Name one: data.hub_config" in several["error"]
    assert "'some/chats' has no configuration 'fr'; expected 'de', 'en'" in unknown["error"]
    assert "'some/chats' has no split 'train'; expected 'train_sft', 'extra'" in no_split["error"]
    assert read["repr"].startswith("Corpus('some/chats': 16 train, 2 eval, 2 test")
    assert read["where"].startswith("some/chats train_sft row ")


def test_reading_a_file_imports_no_torch_and_no_hub(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    code = (
        "import sys; from qlora_helpers.base.config import DataConfig; from qlora_helpers.data.sources import read_corpus; "
        f"read_corpus(DataConfig(source={str(tmp_path / 'a.jsonl')!r})); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow', 'py7zr') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_numbered_summaries_are_more_references(tmp_path, suffix):
    """As in DialogSum's test split: three people summarised each dialogue; `summary_note` is not a summary."""
    import pandas

    rows = [
        {
            "dialogue": f"Ana: {n}\nBo: ok",
            "summary1": f"Ana says {n}.",
            "summary2": f"{n}, says Ana.",
            "summary3": " ",
            "summary_note": "x",
        }
        for n in range(9)
    ]
    path, table = tmp_path / f"rows.{suffix}", pandas.DataFrame(rows)
    if suffix == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        getattr(table, f"to_{suffix}")(path, index=False)
    corpus = read_corpus(DataConfig(source=str(path), summary_column="summary1"))
    for row in (*corpus.train, *corpus.eval, *corpus.test):
        number = row.prompt.split()[1]
        assert (row.answer, row.references) == (f"Ana says {number}.", (f"{number}, says Ana.",))


@pytest.mark.parametrize("name", ["pandas", "json", "text"])
def test_the_name_of_a_kind_of_file_reads_no_files_of_the_working_folder(tmp_path, monkeypatch, name):
    """`datasets` has readers of these names, which take every file around them; that of pandas would unpickle it."""
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (marker.write_text, ("x",))

    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "rows.pkl").write_bytes(pickle.dumps(Evil()))
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=f"'{name}' is a kind of file and not a data set"):
        read_corpus(DataConfig(source=name))
    assert not marker.exists()


@pytest.mark.parametrize("indent", [None, 1])
def test_json_objects_one_after_another_are_rows(tmp_path, indent):
    path = tmp_path / "a.json"
    path.write_text("\n".join(json.dumps(row, indent=indent) for row in rows(8)), encoding="utf-8")
    corpus = read_corpus(DataConfig(source=str(path), eval_rows=1, test_rows=1))
    assert len(corpus.train) == 6


def test_a_table_by_its_columns_is_rows(tmp_path):
    path = tmp_path / "a.json"
    made = rows(8)
    path.write_text(json.dumps({key: [row[key] for row in made] for key in made[0]}), encoding="utf-8")
    corpus = read_corpus(DataConfig(source=str(path), eval_rows=1, test_rows=1))
    assert len(corpus.train) == 6


def test_questions_are_names_of_columns_where_the_settings_say_so(tmp_path):
    path = tmp_path / "a.csv"
    names = ["What did you like about it most of all?", "What should be better the next time around?"]
    lines = [",".join(names), *(f"the boxes with number {number} in them,nothing {number}" for number in range(8))]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match="looks like a row"):
        read_corpus(DataConfig(source=str(path)))
    named = DataConfig(source=str(path), prompt=f"{{{names[0]}}}", answer=f"{{{names[1]}}}", eval_rows=1, test_rows=1)
    assert len(read_corpus(named).train) == 6
