"""Exercises of notebook 03: write the labels, keep packed rows apart, and repair a file."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from qlora_helpers.teaching.exercise import Exercise, NotTried, Wrong, call

IGNORED = -100


def labels(ids, prompt_length, eos, pad):
    """The solution of `write_labels`."""
    found, ended = [], False
    for place, token in enumerate(ids):
        trained = place >= prompt_length and not ended
        found.append(token if trained else -100)
        ended = ended or (place >= prompt_length and token == eos)
    return found


def _judge_labels(function: Any) -> str:
    draw = random.Random()
    for number in range(24):
        eos = draw.randrange(2, 50)
        pad = eos if number % 2 else 1
        words = range(100, 400)
        prompt, answer = draw.sample(words, draw.randrange(3, 9)), draw.sample(words, draw.randrange(2, 7))
        ids = [*prompt, *answer, eos, *[pad] * draw.randrange(2, 6)]
        start, end = len(prompt), len(prompt) + len(answer)
        right = [IGNORED] * start + ids[start : end + 1] + [IGNORED] * (len(ids) - end - 1)
        got = call(function, list(ids), start, eos, pad)
        got = got.tolist() if hasattr(got, "tolist") else got
        if not isinstance(got, list | tuple) or len(got) != len(ids):
            raise Wrong(message=f"Return one label for each of the {len(ids)} tokens.")
        got = list(got)
        if got == right:
            continue
        trained = [place for place, label in enumerate(got) if label != IGNORED]
        if any(got[place] != ids[place] for place in trained):
            raise Wrong("shifted" if _is_shifted(got, ids) else "other-token")
        if any(place < start for place in trained):
            raise Wrong("prompt")
        if any(place > end for place in trained):
            raise Wrong("padding")
        if end not in trained:
            raise Wrong("end-is-padding" if pad == eos else "end")
        if not set(range(start, end)) <= set(trained):
            raise Wrong("answer-cut")
        raise Wrong(message="These labels train something else.")
    return (
        "Twenty-four drawn rows agree, half of them with the end token as padding: the answer and one end are trained, "
        "and nothing else."
    )


def _is_shifted(got: list[int], ids: list[int]) -> bool:
    pairs = [(place, label) for place, label in enumerate(got) if label != IGNORED]
    return all(place + 1 < len(ids) and label == ids[place + 1] for place, label in pairs)


WRITE_LABELS = Exercise(
    name="write_labels",
    title="Write the labels",
    kind="write",
    minutes=12,
    question="Write labels(ids, prompt_length, eos, pad): one label a token, −100 where nothing is trained. In half of the "
    "rows pad and eos are one token.",
    judge=_judge_labels,
    misconceptions={
        "prompt": "You train the prompt. The model would learn to write people's questions; mask the first prompt_length tokens.",
        "padding": "You train what comes after the end. Padding is no part of the answer.",
        "end": "You mask the end token. A model that never trains it never learns to stop.",
        "end-is-padding": "You mask every token that equals pad. In this row the end token is the padding token too, so "
        "its end went as "
        "well: the model never learns to stop. The first end behind the prompt belongs to the answer.",
        "shifted": "You shifted the labels by one. The model does that itself: a label stands at the place of its own token.",
        "other-token": "A label that is trained must be the token itself.",
        "answer-cut": "Part of the answer is masked.",
    },
    hints=(
        "Three parts: the prompt is masked; the answer with its end is trained; what follows is masked.",
        "Don't look for pad: look for the first eos at or behind prompt_length, and mask everything behind it.",
    ),
    solution_is=labels,
)


def may_attend(row_numbers):
    """The solution of `keep_rows_apart`."""
    n = len(row_numbers)
    return [[row_numbers[i] == row_numbers[j] and j <= i for j in range(n)] for i in range(n)]


def _judge_apart(function: Any) -> str:
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attention

    draw = random.Random()
    for _ in range(4):
        lengths = [draw.randrange(3, 8) for _ in range(3)]
        rows = [number for number, length in enumerate(lengths, start=1) for _ in range(length)]
        mask = torch.as_tensor(call(function, list(rows)), dtype=torch.bool)
        if mask.shape != (len(rows), len(rows)):
            raise Wrong(message=f"Return a square of {len(rows)} by {len(rows)}: may token i attend to token j?")
        of = torch.tensor(rows)
        same, causal = of[:, None] == of[None, :], torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        if torch.equal(mask, same & causal):
            q, k, v = torch.randn(3, 1, 1, len(rows), 8, dtype=torch.float64)
            packed = attention(q, k, v, attn_mask=mask)
            behind = lengths[0]
            part = slice(behind, behind + lengths[1])
            alone = attention(q[..., part, :], k[..., part, :], v[..., part, :], is_causal=True)
            assert torch.allclose(packed[..., part, :], alone, atol=1e-10)
            continue
        known = {
            "causal-alone": causal,
            "looks-ahead": same,
            "transposed": (same & causal).T,
            "not-itself": same & causal.tril(-1),
            "inverted": ~(same & causal),
        }
        for code, value in known.items():
            if torch.equal(mask, value):
                raise Wrong(code)
        i, j = (mask != (same & causal)).nonzero()[0].tolist()
        may = "may" if bool((same & causal)[i, j]) else "must not"
        raise Wrong(message=f"Token {i} of row {rows[i]} {may} attend to token {j} of row {rows[j]}.")
    return "Attention of a row in the middle equals the same row's alone, to ten digits, in four drawn sequences."


KEEP_ROWS_APART = Exercise(
    name="keep_rows_apart",
    title="The leak between packed rows",
    kind="break and fix",
    minutes=8,
    question="Write may_attend(row_numbers): [1, 1, 2] says which row each token belongs to; return for each pair whether "
    "token i may attend to token j.",
    judge=_judge_apart,
    misconceptions={
        "causal-alone": "That is the usual causal mask: tokens of the second row see the first one. This is the leak.",
        "looks-ahead": "Tokens see later ones of their row. A model that sees the next token needs not predict it.",
        "transposed": "You swapped i and j: i is the token that looks, j the one that it looks at.",
        "not-itself": "A token may also attend to itself.",
        "inverted": "That says who may not. Return True where token i may attend to token j.",
    },
    hints=(
        "Two conditions must hold at once.",
        "The same row: row_numbers[i] == row_numbers[j]. And not ahead: j <= i.",
    ),
    solution_is=may_attend,
)


def broken_file(folder: str | os.PathLike[str]) -> Path:
    """Writes a file of ten chats in which two rows have a defect, and returns its path.

    Args:
        folder: gets `ten_rows.jsonl`; one that is there already stays as it is.
    """
    path = Path(folder) / "ten_rows.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_broken_lines(), encoding="utf-8")
    return path


def _broken_lines() -> str:
    rows = []
    for number, (question, answer) in enumerate(_TEN):
        user, assistant = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        if number == 3:
            assistant["role"] = "assistent"
        rows.append({"messages": [user] if number == 7 else [user, assistant]})
    return "".join(json.dumps(row) + "\n" for row in rows)


_TEN = (
    ("When do you open on Sunday?", "We open at ten on Sundays."),
    ("Can I bring my dog?", "Dogs are welcome on the terrace."),
    ("Do you have a table for six tonight?", "We have one at half past eight."),
    ("Is the soup vegan?", "The soup of the day is vegan."),
    ("Where can I park?", "There is a car park behind the house."),
    ("Do you take cards?", "We take all cards and cash."),
    ("Can I cancel my booking?", "You can cancel until noon of the same day."),
    ("Is there Wi-Fi?", "There is, and the password is on the menu."),
    ("Do you sell vouchers?", "We sell vouchers at the bar."),
    ("Is the lift working?", "The lift works again since Monday."),
)


def _judge_file(path: Any) -> str:
    from qlora_helpers.base.config import DataConfig
    from qlora_helpers.base.errors import UserError
    from qlora_helpers.data.prepare import prepare
    from qlora_helpers.data.sources import read_corpus
    from qlora_helpers.model.checkpoints import corpus_tokenizer

    path = Path(path)
    if not path.is_file():
        raise Wrong(message=f"There is no file {path.name}.")
    if path.read_text(encoding="utf-8") == _broken_lines():
        raise NotTried
    config = DataConfig(source=str(path), template="plain", seq_len_tokens=256, eval_rows=1, test_rows=1)
    try:
        corpus = read_corpus(config)
        data = prepare(corpus, corpus_tokenizer(), config)
    except UserError as error:
        raise Wrong("refused", error=str(error)) from None
    used = data.report.rows + data.eval_report.rows + len(data.test)
    lines = sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if lines < len(_TEN):
        raise Wrong("deleted", lines=lines)
    if used < lines:
        notes = "; ".join(note for note in data.notes if "skipped" in note) or "look at the notes"
        raise Wrong("skipped", used=used, lines=lines, notes=notes)
    return (
        f"All {used} rows are used, and each trains its answer and its end: {data.report.tokens} tokens, none skipped."
    )


REPAIR_A_FILE = Exercise(
    name="repair_a_file",
    title="Ten rows of your own",
    kind="break and fix",
    minutes=8,
    question="ten_rows.jsonl holds ten chats, and two of them are not used. Read the notes, repair the file, and hand over "
    "its path.",
    judge=_judge_file,
    misconceptions={
        "refused": "The file can't be read: {error}",
        "deleted": "{lines} rows are left. Deleting a row hides its defect: repair it.",
        "skipped": "{used} of {lines} rows are used. The notes say: {notes}",
    },
    hints=(
        "The notes name the line and what is wrong with it. Open the file in JupyterLab's editor.",
        "One row has a role that no model knows, by a slip of the pen; another has no answer.",
    ),
    solution_is='In line 4, "assistent" becomes "assistant". Line 8 gets an answer: {"role": "assistant", "content": "..."}.',
    cell="""rows = [json.loads(line) for line in my_file.read_text().splitlines()]
rows[3]["messages"][1]["role"] = "assistant"
rows[7]["messages"][1:] = [{"role": "assistant", "content": "There is Wi-Fi, and the password is on the menu."}]
my_file.write_text("".join(json.dumps(row) + "\\n" for row in rows))""",
)
