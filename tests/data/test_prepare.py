"""Dialogues become sequences: every row once, nothing lost silently, and what is on disk is used while it fits."""

from __future__ import annotations

import dataclasses
import json

import pytest
from chat_families import family_tokenizer
from tiny import prepared_data

from qlora_helpers.base.config import DataConfig
from qlora_helpers.base.errors import DataError, RunError
from qlora_helpers.base.files import read_json, write_json
from qlora_helpers.data import prepare as data_module
from qlora_helpers.data import sequences
from qlora_helpers.data.chat_rows import REWRITTEN
from qlora_helpers.data.examples import SUMMARIZE, Example, Message, one_turn
from qlora_helpers.data.prepare import fingerprint, load_prepared, prepare, prepared, save_prepared
from qlora_helpers.data.sources import Corpus, read_corpus
from qlora_helpers.model.checkpoints import corpus_tokenizer


def rows_of(blocks, tokenizer) -> dict[str, str]:
    """Each row's text by its id, put together again from the sequences."""
    texts = {}
    for block in blocks:
        for number, row_id in enumerate(block["row_ids"], start=1):
            ids = [token for token, row in zip(block["input_ids"], block["segment_ids"], strict=True) if row == number]
            assert row_id not in texts
            texts[row_id] = tokenizer.decode(ids)
    return texts


@pytest.mark.parametrize("packing", [True, False])
def test_every_row_is_there_once(corpus, tokenizer, packing):
    made = prepared_data(corpus, tokenizer, packing=packing)
    assert made.packed is packing
    for blocks, dialogues, report in (
        (made.train, corpus.train, made.report),
        (made.eval, corpus.eval, made.eval_report),
    ):
        assert rows_of(blocks, tokenizer) == {
            item.id: f"Summarize the chat dialogue:\n{item.prompt}\n---\nSummary:\n{item.answer}<|endoftext|>"
            for item in dialogues
        }
        assert report.passed
        assert report.rows == len(dialogues)
        assert all(len(block["input_ids"]) <= 128 for block in blocks)
        assert len(blocks) == len(dialogues) or packing
    assert made.test == corpus.test
    assert made.notes == ()


def test_packing_saves_sequences(corpus, tokenizer):
    made = prepared_data(corpus, tokenizer, seq_len_tokens=256)
    assert len(made.train) < len(corpus.train)
    assert "4 training, 2 evaluation and 2 test rows" in repr(made)
    assert f"{len(made.train)} sequences of 256 tokens" in repr(made)


def test_a_model_that_can_not_pack_gets_padded_rows(corpus, tokenizer):
    made = prepare(corpus, tokenizer, DataConfig(seq_len_tokens=128), no_packing="its rows leak")
    assert not made.packed
    assert len(made.train) == 4
    assert made.notes == ("rows of this model are padded instead of packed: its rows leak",)
    config = DataConfig(packing=False, seq_len_tokens=128)
    assert prepare(corpus, tokenizer, config, no_packing="its rows leak").notes == ()


@pytest.fixture
def long_corpus(corpus):
    """One dialogue that is too long for 64 tokens, and one whose summary is."""
    long_dialogue = one_turn("long", "rows.csv line 7", "Ana: really?\n" * 40, "Ana doubts it.", instruction=SUMMARIZE)
    long_summary = one_turn("endless", "rows.csv line 9", "Ana: hi", "Ana says hi. " * 40, instruction=SUMMARIZE)
    return dataclasses.replace(
        corpus, train=(*corpus.train, long_dialogue, long_summary), notes=("a note of the source",)
    )


def test_long_rows_are_trimmed_and_named(long_corpus, tokenizer):
    made = prepared_data(long_corpus, tokenizer, long_rows="trim_end")
    texts = rows_of(made.train, tokenizer)
    assert set(texts) == {"d1", "d2", "d3", "d4", "long"}
    assert texts["long"].startswith("Summarize the chat dialogue:\nAna: really?\nAna: really?")
    assert texts["long"].endswith("\n---\nSummary:\nAna doubts it.<|endoftext|>")
    assert (made.report.trimmed, made.report.skipped) == (("long",), ("endless",))
    assert made.report.passed
    cut = len(tokenizer("Ana: really?\n" * 40)["input_ids"])
    first, *rest = made.notes
    assert first == "a note of the source"
    assert rest[0].startswith("rows.csv line 7: the last ")
    assert int(rest[0].split()[5]) < cut
    assert rest[1] == "rows.csv line 9: skipped, its answer alone fills the sequence"


def test_long_rows_are_dropped_and_named(long_corpus, tokenizer):
    made = prepared_data(long_corpus, tokenizer, long_rows="drop")
    assert made.report.skipped == ("long", "endless")
    assert made.report.trimmed == ()
    assert "rows.csv line 7: skipped, " in made.notes[1]
    assert " tokens" in made.notes[1] and "longer than a sequence by " in made.notes[1]


def test_long_rows_are_refused(long_corpus, tokenizer):
    with pytest.raises(
        DataError, match=r"rows\.csv line 7: the row is longer than a sequence; expected at most 128 tokens"
    ):
        prepared_data(long_corpus, tokenizer, long_rows="refuse")


def test_data_without_a_row_that_fits_is_refused(corpus, tokenizer):
    with pytest.raises(DataError, match=r"no row fits into a sequence; got data.seq_len_tokens=32\. Raise it\."):
        prepared_data(corpus, tokenizer, seq_len_tokens=32, long_rows="drop")


def test_the_seed_changes_only_the_order(corpus, tokenizer):
    one, again, other = (prepared_data(corpus, tokenizer, seed=seed, seq_len_tokens=64) for seed in (0, 0, 5))
    assert one.train["row_ids"] == again.train["row_ids"] != other.train["row_ids"]
    assert rows_of(one.train, tokenizer) == rows_of(other.train, tokenizer)


def test_turns_that_can_not_be_trained_are_counted(corpus):
    """A template that writes history otherwise: the last turns are trained, the others are masked, and the report passes."""
    chats = [
        Example(f"c{n}", f"chats.jsonl line {n}", (Message("user", f"q {n}"), Message("assistant", "It left.")) * 2)
        for n in range(4)
    ]
    made = prepare(
        dataclasses.replace(corpus, train=tuple(chats), eval=tuple(chats[:1])),
        family_tokenizer("qwen3"),
        DataConfig(source="chats.jsonl", seq_len_tokens=128),
    )
    assert (made.template, made.report.turns, made.report.masked_turns) == ("chat", 4, 4)
    assert made.report.passed
    assert dict(made.report.lines())["turns trained"] == "4 of 8"
    assert f"4 of 8 turns of the assistant are not trained: {REWRITTEN}" in made.notes


def test_a_template_that_takes_no_row_is_refused_with_the_reason(corpus, tokenizer):
    chat = Example("c", "row 1", (Message("user", "a"), Message("assistant", "b")) * 2)
    with pytest.raises(
        DataError, match=r"no row can be trained with data\.template=recipe; got 1 rows .* one instruction"
    ):
        prepared_data(dataclasses.replace(corpus, train=(chat,)), tokenizer)


def test_documents_are_packed_and_cut_at_the_block_s_length(corpus, tokenizer):
    texts = [f"Page {number}. " + "It left the depot in Leeds this morning. " * 12 for number in range(5)]
    documents = tuple(Example(f"d{n}", f"page {n}", text=text) for n, text in enumerate(texts))
    made = prepared_data(dataclasses.replace(corpus, train=documents, eval=documents[:1]), tokenizer, template="plain")
    assert made.report.passed
    assert made.report.trained_tokens == made.report.tokens - made.report.rows  # all but each part's first
    found = sorted(rows_of(made.train, tokenizer).items())
    assert "".join(text for _, text in found) == "".join(f"{text}<|endoftext|>" for text in texts)
    assert all(len(block["input_ids"]) <= 128 for block in made.train)


def test_many_rows_wait_in_a_file(corpus, tokenizer, monkeypatch, tmp_path):
    whole = prepared_data(corpus, tokenizer)
    monkeypatch.setattr(sequences, "TOKENS_IN_MEMORY", 50)
    monkeypatch.setattr(sequences, "_BATCH_TOKENS", 60)
    config = DataConfig(seq_len_tokens=128)
    spilled = prepare(corpus, tokenizer, config, scratch=tmp_path)
    assert spilled.train.to_list() == whole.train.to_list() and spilled.report == whole.report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.arrow", "train.arrow"]


def test_the_fingerprint_of_an_earlier_version_s_values_is_theirs(tokenizer):
    """`loss_on` was called `summary`, `long_rows` `trim`: data that they prepared are still those of their run."""
    now = DataConfig(template="recipe", loss_on="answer", long_rows="trim_end")
    then = dataclasses.replace(now, loss_on="summary", long_rows="trim")
    assert fingerprint(now, tokenizer, can_pack=True) == fingerprint(then, tokenizer, can_pack=True)


# on disk


def test_saved_data_are_read_back(long_corpus, tokenizer, tmp_path):
    made = prepared_data(long_corpus, tokenizer)
    save_prepared(made, tmp_path / "data", "mark")
    read = load_prepared(tmp_path / "data", "mark")
    assert made.config is not None and read.config is None, "the settings are the run's own; `prepared` adds them"
    for item in [item for item in dataclasses.fields(made) if item.name != "config"]:
        one, other = getattr(made, item.name), getattr(read, item.name)
        assert (one.to_list() == other.to_list()) if item.name in ("train", "eval") else (one == other)
    assert load_prepared(tmp_path / "data", "another mark") is None
    assert load_prepared(tmp_path / "nothing", "mark") is None


def test_data_of_an_older_run_are_read(corpus, tokenizer, tmp_path):
    """Label reports once counted `blocks`."""
    made = prepared_data(corpus, tokenizer)
    save_prepared(made, tmp_path / "data", "mark")
    saved = read_json(tmp_path / "data" / "prepared.json")
    for name in ("report", "eval_report"):
        saved[name]["blocks"] = saved[name].pop("sequences")
    write_json(tmp_path / "data" / "prepared.json", saved)
    read = load_prepared(tmp_path / "data", "mark")
    assert (read.report, read.eval_report) == (made.report, made.eval_report)


def test_a_damaged_prepared_json_is_reported(corpus, tokenizer, tmp_path):
    save_prepared(prepared_data(corpus, tokenizer), tmp_path / "data", "mark")
    (tmp_path / "data" / "prepared.json").write_text("{")
    with pytest.raises(RunError, match="is damaged"):
        load_prepared(tmp_path / "data", "mark")


def test_data_are_made_once_and_again_where_settings_changed(corpus, tokenizer, tmp_path):
    reads = []

    def read(config):
        reads.append(config)
        return corpus

    config = DataConfig(seq_len_tokens=128)
    first = prepared(config, tokenizer, tmp_path / "data", read=read)
    again = prepared(config, tokenizer, tmp_path / "data", read=read)
    assert len(reads) == 1
    assert again.train.to_list() == first.train.to_list()
    config = dataclasses.replace(config, loss_on="all")
    prepared(config, tokenizer, tmp_path / "data", read=read)
    prepared(config, tokenizer, tmp_path / "data", read=read, no_packing="its rows leak")
    assert len(reads) == 3


def test_what_a_proof_chose_stays_once_it_is_settled(corpus, tokenizer, tmp_path):
    """`config.json` alone would have rows packed; the proof on the loaded model had them padded."""
    config, folder = DataConfig(seq_len_tokens=128), tmp_path / "data"
    prepared(config, tokenizer, folder, read=lambda config: corpus, no_packing="its rows leak")
    assert not prepared(config, tokenizer, folder, read=lambda config: corpus, settled=True).packed
    assert prepared(config, tokenizer, folder, read=lambda config: corpus).packed
    assert prepared(config, tokenizer, folder, read=None, no_packing="forecast", settled=True).packed


def test_a_failed_preparation_leaves_what_was_there(corpus, tokenizer, tmp_path, monkeypatch):
    config = DataConfig(seq_len_tokens=128)
    prepared(config, tokenizer, tmp_path / "data", read=lambda config: corpus)
    monkeypatch.setattr(data_module, "write_json", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(dataclasses.replace(config, seed=1), tokenizer, tmp_path / "data", read=lambda config: corpus)
    mark = fingerprint(config, tokenizer, can_pack=True)
    assert load_prepared(tmp_path / "data", mark) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_fingerprint_depends_on_all_that_matters(tokenizer, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"dialogue": "a", "summary": "b"}))
    config = DataConfig(source=str(source))
    mark = fingerprint(config, tokenizer, can_pack=True)
    assert fingerprint(config, corpus_tokenizer(), can_pack=True) == mark
    others = {
        fingerprint(dataclasses.replace(config, **{item.name: value}), tokenizer, can_pack=True)
        for item, value in [(item, _other(item)) for item in dataclasses.fields(DataConfig) if item.name != "source"]
    }
    assert len(others) == len(dataclasses.fields(DataConfig)) - 1
    others.add(fingerprint(config, tokenizer, can_pack=False))
    others.add(fingerprint(config, corpus_tokenizer(vocab_size=1000), can_pack=True))
    padded_otherwise = corpus_tokenizer()
    padded_otherwise.pad_token = "!"
    others.add(fingerprint(config, padded_otherwise, can_pack=True))
    source.write_text(json.dumps({"dialogue": "a", "summary": "c"}))  # the same name, other rows
    others.add(fingerprint(config, tokenizer, can_pack=True))
    assert mark not in others
    assert len(others) == len(dataclasses.fields(DataConfig)) + 3
    chat, other_chat = corpus_tokenizer(), corpus_tokenizer()
    chat.chat_template, other_chat.chat_template = "{{ messages }}", "{{ messages[0] }}"
    config = DataConfig(template="chat")
    assert fingerprint(config, chat, can_pack=True) != fingerprint(config, other_chat, can_pack=True)


def test_the_fingerprint_depends_on_the_vocabulary_itself(tokenizer):
    """Two vocabularies of one size."""

    class Swapped:
        eos_token_id, pad_token_id, chat_template = tokenizer.eos_token_id, tokenizer.pad_token_id, None

        def __len__(self):
            return len(tokenizer)

        def get_vocab(self):
            words = tokenizer.get_vocab()
            first, second = sorted(words)[100:102]
            return words | {first: words[second], second: words[first]}

    marks = [fingerprint(DataConfig(), each, can_pack=True) for each in (tokenizer, Swapped())]
    assert marks[0] != marks[1]


def _other(item):
    if item.metadata["choices"]:
        return next(choice for choice in item.metadata["choices"] if choice != item.default)
    if isinstance(item.default, bool):
        return not item.default
    return "other" if isinstance(item.default, str) else (item.default or 0) + 1


def test_the_embedded_corpus_passes_its_report(tokenizer):
    """All 300 rows, at the length that the demo uses."""
    found = read_corpus(DataConfig(eval_rows=None, test_rows=None))
    assert (len(found.train), len(found.eval), len(found.test)) == (240, 30, 30)
    made = prepare(found, tokenizer, DataConfig(seq_len_tokens=512))
    assert made.report.passed
    assert made.eval_report.passed
    assert (made.report.rows, made.eval_report.rows) == (240, 30)
    assert made.report.skipped == ()
    fill = made.report.tokens / (len(made.train) * 512)
    assert fill > 0.9


def test_the_corpus_of_the_tests_is_a_corpus(corpus):
    assert isinstance(corpus, Corpus)


def test_an_image_column_of_a_stranger_s_data_fetches_nothing(corpus, tokenizer, tmp_path, monkeypatch):
    """`datasets` would fetch the address of each row that is read; the column is refused, and nothing is asked for."""
    import pyarrow

    save_prepared(prepared_data(corpus, tokenizer), tmp_path / "data", "mark")
    folder = tmp_path / "data" / "train"
    path = next(folder.glob("*.arrow"))
    table = pyarrow.ipc.open_stream(path.read_bytes()).read_all()
    picture = pyarrow.array([{"bytes": None, "path": "http://127.0.0.1:9/beacon"}] * len(table))
    info = read_json(folder / "dataset_info.json")
    info["features"]["picture"] = {"_type": "Image"}
    write_json(folder / "dataset_info.json", info)
    told = {"huggingface": json.dumps({"info": {"features": info["features"]}})}
    table = table.append_column("picture", picture).replace_schema_metadata(told)
    with pyarrow.ipc.new_stream(str(path), table.schema) as file:
        file.write_table(table)
    asked = []
    monkeypatch.setattr("socket.socket.connect", lambda *to: asked.append(to))
    with pytest.raises(
        RunError, match=r"data/train are damaged \(the column 'picture' holds other things than numbers\)"
    ):
        load_prepared(tmp_path / "data", "mark")
    for column in ("input_ids", "labels"):  # of numbers that are declared to be pictures
        told = {"huggingface": json.dumps({"info": {"features": info["features"] | {column: {"_type": "Image"}}}})}
        plain = table.drop_columns(["picture"]).replace_schema_metadata(told)
        with pyarrow.ipc.new_stream(str(path), plain.schema) as file:
            file.write_table(plain)
        assert isinstance(load_prepared(tmp_path / "data", "mark").train[0][column][0], int)
    assert asked == []


def test_files_elsewhere_that_a_stranger_s_folder_lists_are_not_read(corpus, tokenizer, tmp_path):
    save_prepared(prepared_data(corpus, tokenizer), tmp_path / "data", "mark")
    folder = tmp_path / "data" / "train"
    state = read_json(folder / "state.json")
    write_json(folder / "state.json", state | {"_data_files": [{"filename": "../../elsewhere.arrow"}]})
    assert load_prepared(tmp_path / "data", "mark").train["row_ids"]
    path = next(folder.glob("*.arrow"))
    path.rename(tmp_path / "elsewhere.arrow")
    path.symlink_to(tmp_path / "elsewhere.arrow")
    with pytest.raises(RunError, match="are damaged"):
        load_prepared(tmp_path / "data", "mark")


def test_prepared_data_that_unpack_to_far_more_are_refused(corpus, tokenizer, tmp_path, monkeypatch):
    import pyarrow

    from qlora_helpers.data import prepared_tables

    save_prepared(prepared_data(corpus, tokenizer), tmp_path / "data", "mark")
    path = next((tmp_path / "data" / "train").glob("*.arrow"))
    table = pyarrow.ipc.open_stream(path.read_bytes()).read_all()
    table = table.append_column("more", pyarrow.array(["z" * 100_000] * len(table)))
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(str(path), table.schema, options=options) as file:
        file.write_table(table)
    assert load_prepared(tmp_path / "data", "mark").train["row_ids"]
    monkeypatch.setattr(prepared_tables, "MAX_FILE_BYTES", 90_000)
    with pytest.raises(RunError, match="they unpack to more than can be held in memory"):
        load_prepared(tmp_path / "data", "mark")


def test_the_same_rows_under_another_path_are_the_same_data(corpus, tokenizer, tmp_path):
    source, moved = tmp_path / "rows.jsonl", tmp_path / "deeper" / "renamed.jsonl"
    source.write_text("the content counts")
    config = DataConfig(source=str(source), seq_len_tokens=128)
    reads = []

    def read(config):
        reads.append(config.source)
        return corpus

    first = prepared(config, tokenizer, tmp_path / "data", read=read)
    moved.parent.mkdir()
    source.rename(moved)
    gone = prepared(config, tokenizer, tmp_path / "data", read=read)
    there = prepared(dataclasses.replace(config, source=str(moved)), tokenizer, tmp_path / "data", read=read)
    assert reads == [str(source)]
    assert first.train.to_list() == gone.train.to_list() == there.train.to_list()
    moved.write_text("another content")
    prepared(dataclasses.replace(config, source=str(moved)), tokenizer, tmp_path / "data", read=read)
    prepared(dataclasses.replace(config, source="somebody/else"), tokenizer, tmp_path / "data", read=read)
    assert reads == [str(source), str(moved), "somebody/else"]


def test_data_of_a_run_from_before_content_was_kept_are_used(corpus, tokenizer, tmp_path):
    """Its fingerprint held the path too."""
    source = tmp_path / "rows.jsonl"
    source.write_text("x")
    config = DataConfig(source=str(source), seq_len_tokens=128)
    mark = data_module._earlier_fingerprint(config, tokenizer, True)
    assert mark != fingerprint(config, tokenizer, can_pack=True)
    save_prepared(prepared_data(corpus, tokenizer), tmp_path / "data", mark)
    assert prepared(config, tokenizer, tmp_path / "data", read=None).report.passed


def test_prepared_data_with_a_damaged_offset_are_refused(corpus, tokenizer, tmp_path):
    """Arrow would read beyond the file."""
    save_prepared(prepared_data(corpus, tokenizer), tmp_path / "data", "mark")
    path = next((tmp_path / "data" / "train").glob("*.arrow"))
    offsets = load_prepared(tmp_path / "data", "mark").train.data.table["input_ids"].chunk(0).buffers()[1].to_pybytes()
    whole = path.read_bytes()
    assert whole.count(offsets[:12]) >= 1
    damaged = offsets[:4] + (2**30).to_bytes(4, "little") + offsets[8:12]
    path.write_bytes(whole.replace(offsets[:12], damaged))
    with pytest.raises(RunError, match="are damaged"):
        load_prepared(tmp_path / "data", "mark")
