"""Files as people have them: separators, encodings, quotes, sheets, compressed files, folders; and what is too large is refused."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import io
import json
import random
import re
import unicodedata
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError
from qlora_helpers.data import compressed, duplicates, encodings, excel, rows, tables
from qlora_helpers.data.arrow_messages import unpacked_bytes
from qlora_helpers.data.parquet_pages import unpacked_page_bytes
from qlora_helpers.data.sources import read_corpus

TEXTS = [(f"Zoë: naïve café {n}?\nBo: größer", f"Über {n}, dit Élise.") for n in range(12)]
RECORDS = [{"dialogue": dialogue, "summary": summary} for dialogue, summary in TEXTS]


def table(separator: str = ",", quote: str = '""', end: str = "\r\n") -> str:
    rows = [[f'{d} say "so{separator}"', s] for d, s in TEXTS]
    quoted = [
        '"' + d.replace('"', quote) + f'"{separator}{s if separator not in s else chr(34) + s + chr(34)}'
        for d, s in rows
    ]
    return end.join([f"dialogue{separator}summary", *quoted, ""])


def read(path, **settings):
    return read_corpus(DataConfig(source=str(path), eval_rows=2, test_rows=2, **settings))


def pairs(corpus) -> set:
    return {(row.prompt, row.answer) for row in (*corpus.train, *corpus.eval, *corpus.test)}


def expected(separator: str = ",") -> set:
    return {(f'{d} say "so{separator}"', s) for d, s in TEXTS}


# tables as text


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_separator_and_encoding_are_recognised(tmp_path, separator, encoding):
    path = tmp_path / "rows.csv"
    path.write_bytes(table(separator).encode(encoding))
    corpus = read(path)
    assert pairs(corpus) == expected(separator)
    said = " ".join(corpus.notes)
    assert ("divides its columns" in said) == (separator != ",")
    assert ("guessed from its bytes" in said and "'Zoë'" in said) == (encoding == "cp1252")
    assert ("read as UTF-16" in said) == encoding.startswith("utf-16")


def test_a_tsv_file_is_divided_by_tabs(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text(table("\t"), encoding="utf-8")
    corpus = read(path)
    assert pairs(corpus) == expected("\t") and not any("divides" in note for note in corpus.notes)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (table(quote='\\"'), expected()),  # backslashes before quotes, as MySQL writes them
        ("sep=;\n" + table(";"), expected(";")),  # Excel's own first line
        (table(end="\n").replace(",", ", ", 1).replace('",', '", '), expected()),  # blanks behind separators
    ],
)
def test_other_habits_of_quoting(tmp_path, text, wanted):
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8", newline="")
    assert pairs(read(path)) == wanted


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1251", "Привет, ты придёшь завтра на встречу? Да, конечно"),
        ("cp932", "明日の会議は何時に始まりますか。午後三時からです"),
        ("gb18030", "阿丽，你明天能修蛋糕吗？好的，我会修蛋糕"),
    ],
)
def test_a_guess_is_said_with_words_to_check_it_by_and_can_be_overruled(tmp_path, encoding, text):
    lines = ["dialogue,summary", *(f'"{text} {n}","{text}"' for n in range(12))]
    path = tmp_path / "rows.csv"
    path.write_bytes("\n".join(lines).encode(encoding))
    corpus = read(path, encoding=encoding)
    assert (f"{text} 3", text) in pairs(corpus)
    guessed = read(path)
    assert pairs(guessed) == pairs(corpus)
    assert any("guessed from its bytes ('" in note and "data.encoding" in note for note in guessed.notes)


def test_what_the_settings_say_is_believed(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b;c,d\n" + "".join(f"1,{n};3,4\n" for n in range(9)))
    with pytest.raises(DataError, match="several ways"):
        read(path)
    assert ("1,3", "3,4") in pairs(read(path, separator=";"))
    with pytest.raises(DataError, match=r"data\.separator is 'ab'; expected one character"):
        read(path, separator="ab")
    with pytest.raises(DataError, match="there is no encoding 'klingon'"):
        read(path, encoding="klingon")
    with pytest.raises(DataError, match="there is no encoding 'hex'"):
        read(path, encoding="hex")


def test_a_long_field_is_read_within_the_limit_on_texts(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    rows = "".join(f'"{"word " * 40_000}{n}",short\n' for n in range(9))
    path.write_text("dialogue,summary\n" + rows)
    assert all(len(row.prompt) > 200_000 for row in read(path).train)


def test_columns_of_a_header_are_compared_once_each(tmp_path, monkeypatch):
    """A header of n columns is looked at n times, not n times n."""
    from qlora_helpers.data import csv_files

    counted = []

    class Name(str):
        def __hash__(self):
            counted.append(1)
            return super().__hash__()

        def __eq__(self, other):
            counted.append(1)
            return super().__eq__(other)

    costs = []
    for count in (1000, 2000):
        counted.clear()
        csv_files.checked_header([Name(f"c{n}") for n in range(count)], "here")
        costs.append(len(counted))
    assert costs[1] < 2.5 * costs[0]
    path = tmp_path / "wide.csv"
    path.write_text(",".join(f"c{n}" for n in range(20_000)) + "\n1,2\n")
    with pytest.raises(DataError, match=r"line 1 is not a header.*10,000 at most; got 20,000 names"):
        read(path)


# JSON


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_json_in_utf_16_is_read(tmp_path, name, encoding):
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    text = "[" + ",".join(lines) + "]" if name == "rows.json" else "\n".join(lines)
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert pairs(read(tmp_path / name)) == set(TEXTS)


@pytest.mark.parametrize("orient", ["columns", "index", "split", "table", "records"])
def test_tables_of_pandas_are_read(tmp_path, orient):
    import pandas

    pandas.DataFrame(RECORDS).to_json(tmp_path / "rows.json", orient=orient)
    assert pairs(read(tmp_path / "rows.json")) == set(TEXTS)


# tables in binary


def nested() -> pyarrow.Table:
    chats = [
        [{"role": "user", "content": d, "weight": None}, {"role": "assistant", "content": s, "weight": n % 2 or None}]
        for n, (d, s) in enumerate(TEXTS)
    ]
    return pyarrow.table({"messages": chats, "picture": [b"\x89PNG"] * 12})


def written(path, found: pyarrow.Table):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(found, path)
    elif path.suffix == ".feather":
        with pyarrow.ipc.new_file(
            str(path), found.schema, options=pyarrow.ipc.IpcWriteOptions(compression="lz4")
        ) as file:
            file.write_table(found)
    else:
        with pyarrow.ipc.new_stream(str(path), found.schema) as file:
            file.write_table(found)
    return path


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.feather"])
def test_nested_lists_and_structs_are_read(tmp_path, name):
    corpus = read(written(tmp_path / name, nested()))
    assert pairs(corpus) == set(TEXTS) and corpus.form == "messages"
    kinds = {"large": pyarrow.large_string(), "view": pyarrow.string_view(), "text": pyarrow.string()}
    for kind in kinds.values():
        columns = {name: pyarrow.array([record[name] for record in RECORDS], kind) for name in RECORDS[0]}
        if not (kind == pyarrow.string_view() and name == "rows.parquet"):
            assert pairs(read(written(tmp_path / name, pyarrow.table(columns)))) == set(TEXTS)
    turns = pyarrow.table({"dialogue": [d.splitlines() for d, _ in TEXTS], "summary": [s for _, s in TEXTS]})
    assert pairs(read(written(tmp_path / name, turns))) == set(TEXTS)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_columns_that_hold_no_text_are_refused_in_a_sentence(tmp_path, name):
    summaries = [s for _, s in TEXTS]
    for values, piece in (
        (pyarrow.array([b"x"] * 12), "holds binary; expected texts, numbers"),
        (pyarrow.array([[("a", "b")]] * 12, pyarrow.map_(pyarrow.string(), pyarrow.string())), "holds map<"),
        (pyarrow.array([0] * 12, pyarrow.timestamp("ms")), "holds timestamp"),
        (pyarrow.array([{"a": "x"}] * 12), "is not text but an object with 'a'"),
        (pyarrow.array([7] * 12), "is not text but int"),
    ):
        path = written(tmp_path / name, pyarrow.table({"dialogue": values, "summary": summaries}))
        with pytest.raises(DataError, match="dialogue") as caught:
            read(path)
        assert piece in str(caught.value)


def test_rows_values_and_bytes_are_limited_before_they_are_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_ROWS", 1000)
    nulls = pyarrow.nulls(5000, pyarrow.string())
    path = written(tmp_path / "nulls.parquet", pyarrow.table({"dialogue": nulls, "summary": nulls}))
    with pytest.raises(DataError, match=r"nulls.parquet has too many rows; expected 1,000 at most; got 5,000"):
        read(path)
    monkeypatch.setattr(tables, "MAX_VALUES", 10_000)
    zeros = pyarrow.ListArray.from_arrays(
        pyarrow.array([0, 20_000], pyarrow.int32()), pyarrow.nulls(20_000, pyarrow.int8())
    )
    path = written(tmp_path / "list.parquet", pyarrow.table({"dialogue": zeros, "summary": ["x"]}))
    with pytest.raises(DataError, match=r"list.parquet has too many values; expected 10,000 at most"):
        read(path)
    monkeypatch.setattr(tables, "MAX_VALUES", 10**9)
    monkeypatch.setattr(compressed, "MAX_FILE_BYTES", 200_000)
    for name in ("list.parquet", "list.arrow"):
        path = written(tmp_path / name, pyarrow.table({"dialogue": zeros, "summary": ["x"]}))
        with pytest.raises(DataError, match=r"unfolds to more than can be held in memory"):
            read(path)
    once = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 64, pyarrow.int32()), pyarrow.array(["y" * 9000]))
    path = written(tmp_path / "once.arrow", pyarrow.table({"dialogue": once, "summary": ["x"] * 64}))
    with pytest.raises(DataError, match=r"once.arrow unfolds to more"):
        read(path)


def varint(number: int) -> bytes:
    """A number as Thrift's compact protocol writes it."""
    number, found = number << 1, []
    while number >= 128:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_a_parquet_file_that_says_it_is_small_is_not_believed(tmp_path, monkeypatch, version, dictionary):
    """The sizes in the file's own list of columns are replaced by 1; those of the pages are what a reader takes."""
    path = tmp_path / "rows.parquet"
    more = [f"{n}" + "z" * 100_000 for n in range(len(TEXTS))]
    found = pyarrow.Table.from_pylist(RECORDS).append_column("more", pyarrow.array(more))
    pyarrow.parquet.write_table(
        found, path, compression="zstd", use_dictionary=dictionary, data_page_version=version, data_page_size=1000
    )
    metadata = pyarrow.parquet.read_metadata(path)
    group = metadata.row_group(0)
    with path.open("rb") as file:
        assert 0 <= group.total_byte_size - unpacked_page_bytes(file, metadata, 10**9) < 10_000  # without the headers
    content = bytearray(path.read_bytes())
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for size in {group.total_byte_size, *(group.column(n).total_uncompressed_size for n in range(3))}:
        if size > 900_000:
            old = varint(size)
            assert old in content[start:]
            content[start:] = content[start:].replace(old, b"\x82" + b"\x80" * (len(old) - 2) + b"\x00")
    path.write_bytes(content)
    assert pyarrow.parquet.read_metadata(path).row_group(0).total_byte_size == 1
    assert pairs(read(path)) == set(TEXTS)
    monkeypatch.setattr(compressed, "MAX_FILE_BYTES", 900_000)
    with pytest.raises(DataError, match=r"rows.parquet is too large to be held in memory; .*got 1.\d MiB"):
        read(path)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("new", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_a_batch_that_unpacks_to_far_more_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, new, compression):
    """Arrow unpacks a batch as a whole, and has no limit of its own."""
    path, options = tmp_path / "rows.arrow", pyarrow.ipc.IpcWriteOptions(compression=compression)
    more = pyarrow.array(["z" * 100_000] * len(TEXTS))
    sizes = []
    for values in (more.dictionary_encode(), more):  # a dictionary holds the text once
        found = pyarrow.Table.from_pylist(RECORDS).append_column("more", values)
        with new(str(path), found.schema, options=options) as file:
            file.write_table(found)
        assert path.stat().st_size < 20_000
        with path.open("rb") as file:
            file.seek(8 if new == pyarrow.ipc.new_file else 0)
            sizes.append(unpacked_bytes(file))
    assert 100_000 < sizes[0] < 110_000 and 1_200_000 < sizes[1] < 1_210_000
    assert pairs(read(path)) == set(TEXTS)
    monkeypatch.setattr(compressed, "MAX_FILE_BYTES", 900_000)
    with pytest.raises(DataError, match=r"rows.arrow is too large to be held in memory; .*got 1.1 MiB"):
        read(path)  # said before a batch is read; what is counted while reading "unfolds"


def test_rows_of_any_kind_of_file_are_limited(tmp_path, monkeypatch):
    from qlora_helpers.data import conversion

    monkeypatch.setattr(conversion, "MAX_ROWS", 100)
    (tmp_path / "many.jsonl").write_text("{}\n" * 101)
    with pytest.raises(DataError, match=r"many.jsonl line 101: there are too many rows; expected 100 at most"):
        read(tmp_path / "many.jsonl")


# Excel


def workbook(path, *sheets):
    import openpyxl

    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, lines in sheets:
        sheet = book.create_sheet(title)
        for line in lines:
            sheet.append(line)
    book.save(path)
    return path


def test_a_sheet_is_read(tmp_path):
    rows = [["question", "answer"], *([d, n] for n, (d, _) in enumerate(TEXTS)), [None, None]]
    corpus = read(workbook(tmp_path / "rows.xlsx", ("empty", []), ("Fragen", rows)))
    assert pairs(corpus) == {(d, str(n)) for n, (d, _) in enumerate(TEXTS)}
    assert any("read the sheet 'Fragen' of 'empty', 'Fragen'" in note for note in corpus.notes)
    assert "rows.xlsx row 5" in {row.where for row in (*corpus.train, *corpus.eval, *corpus.test)}
    with pytest.raises(DataError, match="has no sheet 'nothing'; got the sheets 'empty', 'Fragen'"):
        read(tmp_path / "rows.xlsx", sheet="nothing")


def test_a_formula_without_a_saved_value_is_named(tmp_path):
    """Programs that don't calculate write it so, and its cell would pass for an empty one."""
    rows = [["subject", "body", "answer"], *([f"s{n}", "b", f"a{n}"] for n in range(6))]
    rows[3][1] = '="b" & 1'
    path = workbook(tmp_path / "rows.xlsx", ("a", rows))
    corpus = read(path, prompt="{subject} {body}", answer="{answer}")
    assert pairs(corpus) == {(f"s{n} b", f"a{n}") for n in range(6) if n != 2}
    assert any("formulas without a saved value: 1, the first in B4" in note for note in corpus.notes)
    assert any("row 4: skipped" in note and "is not text but a formula without" in note for note in corpus.notes)
    assert len(pairs(read(path, prompt="{subject}", answer="{answer}"))) == 6  # a column that isn't needed


def test_days_and_hidden_sheets_of_a_workbook(tmp_path):
    """Excel knows no days without a time, and a hidden sheet is not the one that a person sees."""
    import openpyxl

    rows = [["question", "answer"], *([f"q{n}", datetime.datetime(2024, 1, 2 + n, 12 * (n == 5))] for n in range(6))]
    path = workbook(tmp_path / "rows.xlsx", ("lists", [["question", "answer"], ["x", "y"]]), ("rows", rows))
    book = openpyxl.load_workbook(path)
    book.active = 1
    book["lists"].sheet_state = "hidden"
    book.save(path)
    days = {(f"q{n}", f"2024-01-0{2 + n}") for n in range(5)}
    assert pairs(read(path)) == days | {("q5", "2024-01-07T12:00:00")}


def test_broken_and_endless_sheets_are_refused(tmp_path, monkeypatch):
    path = workbook(tmp_path / "rows.xlsx", ("a", [["question", "answer"], ["x", "y", "z"]]))
    with pytest.raises(DataError, match="row 2 has cells beyond its columns; expected 2"):
        read(path)
    workbook(path, ("a", [["question", "question"], ["x", "y"]]))
    with pytest.raises(DataError, match="row 1 is not a header.*'question' repeated"):
        read(path)
    workbook(path, ("a", [["question", "answer"]]))
    with pytest.raises(DataError, match="holds no rows"):
        read(path)
    path.write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(DataError, match="not a complete Excel file"):
        read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "x")
    with pytest.raises(DataError, match="not a complete Excel file"):
        read(path)
    workbook(path, ("a", [["question", "answer"], *([f"q{n}", "a" * 50] for n in range(200))]))
    for name, most, piece in (
        ("MAX_UNZIPPED_BYTES", 5000, "unpacks to more"),
        ("MAX_SHEET_CELLS", 100, "too many cells"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(excel, name, most)
            with pytest.raises(DataError, match=piece):
                read(path)


def test_parts_of_a_workbook_that_are_read_as_a_whole_are_limited(tmp_path, monkeypatch):
    """Styles of kilobytes would take gigabytes, whatever the rows are; the sheet itself is streamed."""
    path = workbook(tmp_path / "rows.xlsx", ("a", [["question", "answer"], *([f"q{n}", "a"] for n in range(9))]))
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}

    def spoilt(count):
        styles = parts["xl/styles.xml"].replace(b"<cellXfs", b"<dxfs>" + b"<dxf/>" * count + b"</dxfs><cellXfs")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in parts.items():
                archive.writestr(name, styles if name == "xl/styles.xml" else content)
        return path

    assert len(pairs(read(spoilt(100)))) == 9
    with pytest.raises(DataError, match=r"rows.xlsx unpacks to more.* 500,000 entries in xl/styles.xml at most"):
        read(spoilt(600_000))
    monkeypatch.setattr(excel, "GROWTH_BYTES", 100_000)
    with pytest.raises(DataError, match=r"rows.xlsx unpacks to more than can be held in memory; expected .* at most"):
        read(spoilt(400_000))


def test_a_cell_at_the_far_end_of_a_sheet_takes_no_memory(tmp_path, monkeypatch):
    path = workbook(tmp_path / "rows.xlsx", ("a", [["question", "answer"], *([f"q{n}", "a"] for n in range(9))]))
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    sheet = parts["xl/worksheets/sheet1.xml"].decode()
    far = '<row r="99999999"><c r="A99999999" t="inlineStr"><is><t>x</t></is></c></row></sheetData>'
    parts["xl/worksheets/sheet1.xml"] = sheet.replace("</sheetData>", far).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    monkeypatch.setattr(excel, "MAX_SHEET_ROWS", 1000)
    with pytest.raises(DataError, match="too many cells; expected 1,000 rows"):
        read(path)


# compressed files


def packed(suffix: str, data: bytes) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    sink = io.BytesIO()
    with pyarrow.CompressedOutputStream(pyarrow.PythonFile(sink, mode="w"), "zstd") as stream:
        stream.write(data)
        stream.flush()
        return sink.getvalue() if sink.closed else _end(stream, sink)


def _end(stream, sink: io.BytesIO) -> bytes:
    kept = io.BytesIO()
    sink.close = lambda: kept.write(sink.getvalue()) and None  # type: ignore[method-assign]
    stream.close()
    return kept.getvalue() or sink.getvalue()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_read_within_the_limit(tmp_path, suffix, monkeypatch):
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    for name, data in (
        ("rows.jsonl", lines),
        ("rows.csv", table().encode()),
        ("rows.json", json.dumps(RECORDS).encode()),
    ):
        path = tmp_path / (name + suffix)
        path.write_bytes(packed(suffix, data))
        assert pairs(read(path)) == (expected() if name == "rows.csv" else set(TEXTS))
        assert read(path).name == name + suffix
    bomb = tmp_path / f"bomb.jsonl{suffix}"
    bomb.write_bytes(packed(suffix, b" " * 5_000_000))
    assert bomb.stat().st_size < 10_000
    monkeypatch.setattr(compressed, "MAX_FILE_BYTES", 1_000_000)
    with pytest.raises(DataError, match=rf"bomb.jsonl{suffix} unpacks to more than can be held in memory"):
        read(bomb)
    for data in (packed(suffix, lines)[:-5], b"nothing of the kind"):
        (tmp_path / f"cut.jsonl{suffix}").write_bytes(data)
        with pytest.raises(DataError, match=rf"cut.jsonl{suffix} is not a complete {suffix} file"):
            read(tmp_path / f"cut.jsonl{suffix}")


# folders and patterns


def test_a_folder_or_a_pattern_is_read_as_one_source(tmp_path, monkeypatch):
    parts = {"a.jsonl": RECORDS[:4], "b.jsonl": RECORDS[4:8]}
    for name, records in parts.items():
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "c.csv").write_text(
        "dialogue,summary\n" + "".join(f'"{d}","{s}"\n' for d, s in TEXTS[8:]), encoding="utf-8"
    )
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    corpus = read(tmp_path)
    assert pairs(corpus) == set(TEXTS) and any("3 files were read" in note for note in corpus.notes)
    assert {row.where for row in corpus.train} & {"a.jsonl line 2", "b.jsonl line 3", "c.csv line 2"}
    monkeypatch.chdir(tmp_path)
    assert pairs(read("*.jsonl")) == set(TEXTS[:8])
    with pytest.raises(DataError, match=r"no data file fits '\*.parquet'"):
        read("*.parquet")
    monkeypatch.setattr(compressed, "MAX_FILE_BYTES", 900)
    with pytest.raises(DataError, match="names too much"):
        read(tmp_path)


def test_files_named_after_splits_are_the_splits(tmp_path):
    names = {"train-00000-of-00002": 0, "train-00001-of-00002": 4, "validation": 8, "test.part": 10, "training": None}
    for name, start in names.items():
        found = [] if start is None else RECORDS[start : start + (4 if name.startswith("train") else 2)]
        if found:
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    corpus = read_corpus(DataConfig(source=str(tmp_path), eval_rows=None, test_rows=None))
    assert (len(corpus.train), len(corpus.eval), len(corpus.test)) == (8, 2, 2)
    assert {(row.prompt, row.answer) for row in corpus.test} == set(TEXTS[10:])


# damage


@pytest.mark.parametrize(
    "name", ["rows.parquet", "rows.arrow", "rows.feather", "rows.xlsx", "rows.jsonl.gz", "rows.csv"]
)
def test_damaged_bytes_of_any_kind_end_in_one_message(tmp_path, name):
    """Arrow follows the offsets of its files as they are, and a damaged one may lead anywhere: they are checked first."""
    path = tmp_path / name
    if name in ("rows.parquet", "rows.arrow", "rows.feather"):
        written(path, nested())
    elif name == "rows.xlsx":
        workbook(path, ("a", [["question", "answer"], *([f"q{n}", n] for n in range(9))]))
    else:
        lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else table("\t").encode("cp1252"))
    whole, chance = path.read_bytes(), random.Random(0)
    for _ in range(80):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 2, 5])):
            place = chance.randrange(len(data))
            if chance.random() < 0.7:
                data[place] = chance.randrange(256)
            else:
                del data[place : place + chance.randrange(1, 50)]
        path.write_bytes(data)
        try:
            read(path)
        except DataError as error:
            assert name in str(error) and all(char.isprintable() or char == "\n" for char in str(error))


def test_a_key_is_that_of_the_words_that_a_pattern_finds():
    """Keys are kept in run folders, so they have to stay what they were."""
    texts = [
        "Ana: a_b, c-d",
        "e\x1cf\x85g\u2028h\xa0i",
        "Straße, İstanbul",
        "日本語。テキスト",
        "ça 🎂 x",
        "१२ ٣",
        "a\x00b",
        "  ",
    ]
    for text in [*texts, *(chr(code) + " a" for code in range(0x3100))]:
        words = " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))
        assert duplicates.words_key(text) == hashlib.sha256((words or text).encode()).hexdigest()[:24], repr(text)


# growth


def test_a_key_of_many_combining_marks_takes_steps_in_step_with_its_length(monkeypatch):
    """Normalising a run of n marks takes n times n steps: longer runs than any script has are shortened first."""
    lengths = []
    normalize = duplicates.unicodedata.normalize
    monkeypatch.setattr(
        duplicates.unicodedata, "normalize", lambda form, text: lengths.append(len(text)) or normalize(form, text)
    )
    marks = "\u0301\u0327" * 200_000
    first, second = duplicates.words_key("e" + marks), duplicates.words_key("e" + marks + "\u0301" * 9)
    assert max(lengths) < 100 and first == second
    assert duplicates.words_key("e\u0301 a") == duplicates.words_key("É, a")
    assert duplicates.words_key("...") != duplicates.words_key("!!!")


def test_a_row_is_read_a_set_number_of_times(tmp_path, monkeypatch):
    """Of a file of n rows each is parsed once, and those of the sample twice."""
    from qlora_helpers.data import conversion, readers

    parsed = []
    loads = json.loads
    monkeypatch.setattr(readers.json, "loads", lambda text, **more: parsed.append(1) or loads(text, **more))
    monkeypatch.setattr(conversion, "SAMPLE_ROWS", 10)
    for count in (200, 400):
        parsed.clear()
        (tmp_path / "rows.jsonl").write_text(
            "".join(f'{{"dialogue": "A: {n}", "summary": "{n}"}}\n' for n in range(count))
        )
        read(tmp_path / "rows.jsonl")
        assert len(parsed) <= count + 11


def test_the_limits_are_those_that_are_stated():
    assert (compressed.MAX_FILE_BYTES, encodings.MAX_LINE_BYTES, rows.MAX_ROWS) == (
        2 * 1024**3,
        10 * 1024**2,
        2_000_000,
    )
