"""Settings of the data."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_helpers.base.config.option import option


@dataclass(frozen=True)
class DataConfig:
    """Where the rows come from, how they are read, and how they become labelled sequences of tokens."""

    source: str = option(
        "embedded",
        "Data: embedded or embedded:tickets (corpora in this package); a .json, .jsonl, .csv, .tsv, .parquet, .arrow, .xlsx, .txt, "
        ".md or .7z file, also .gz or .zst; a folder or a pattern such as data/*.jsonl; or a hub data set's id.",
    )
    format: str = option(
        "auto",
        "What a row is: messages (OpenAI), conversations (ShareGPT), alpaca, prompt_completion, question_answer, dialogue (with "
        "its summary), columns (any, by data.prompt and data.answer, or the only two), transcript (conversations in one text with "
        "marks such as '### Human:'), or text (documents); auto recognises it.",
        choices=(
            *(
                "auto",
                "messages",
                "conversations",
                "alpaca",
                "prompt_completion",
                "question_answer",
                "dialogue",
                "columns",
                "transcript",
            ),
            "text",
        ),
    )
    prompt: str | None = option(
        None,
        "What the model is asked, with columns in braces: 'Classify.\\n\\n{subject}\\n{body}'; the text's own braces are doubled.",
        many_lines=True,
    )
    answer: str | None = option(
        None, "What the model learns to answer, with columns in braces, such as '{label}'.", many_lines=True
    )
    dialogue_column: str = option("dialogue", "Column that holds the dialogue.")
    summary_column: str = option("summary", "Column that holds the summary.")
    column: str | None = option(
        None, "Column that holds the messages, or the document's text; none looks for the usual names."
    )
    instruction: str | None = option(
        None,
        "Text that stands before each row's own; none takes 'Summarize the chat dialogue:' for dialogues, and nothing for others.",
        many_lines=True,
    )
    system: str | None = option(
        None, "The system's message, before each conversation that has none; none adds no message.", many_lines=True
    )
    bad_rows: str = option(
        "skip",
        "What to do with rows that can't be used (empty answers, roles out of order, ...): skip and name them, or refuse the data.",
        choices=("skip", "refuse"),
    )
    encoding: str | None = option(
        None, "Encoding of a text file, such as cp1252; none recognises it (JSON: UTF-8, or UTF-16 by its mark)."
    )
    separator: str | None = option(
        None, "Character between the fields of a CSV file, such as ; or \\t; none recognises it.", many_lines=True
    )
    sheet: str | None = option(None, "Sheet of an Excel file; none takes the first that holds rows.")
    hub_config: str | None = option(None, "Configuration (subset) of a hub data set; none takes its default.")
    hub_split: str | None = option(
        None,
        "The only split of a hub data set to read, such as train_sft; none reads those for training, validation and test.",
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub data set; none takes the default branch.")
    template: str = option(
        "auto",
        "How rows are written: chat takes the model's own chat template, plain a text of our own, recipe the 2023 recipe's prompt; "
        "auto takes chat where it works, else plain, and recipe for the embedded dialogues.",
        choices=("auto", "chat", "plain", "recipe"),
    )
    loss_on: str = option(
        "answer",
        "Tokens that are trained: the answers and their ends, which is right for a task, or all tokens, as in the recipe.",
        choices=("answer", "all"),
    )
    train_on: str = option(
        "all_turns",
        "Which of the assistant's turns are trained: all that can be, or the last one of each row alone.",
        choices=("all_turns", "last_turn"),
    )
    packing: bool = option(
        True, "Pack several rows into one sequence, without attention between them; off pads each row instead."
    )
    seq_len_tokens: int = option(
        1024,
        "Sequence length, tokens: the length of a packed sequence, and the longest row that can be trained.",
        low=32,
    )
    long_rows: str = option(
        "auto",
        "What to do with a row longer than a sequence: cut the start (oldest turns first), the middle or the end of its prompt, "
        "split it (documents), drop it, or refuse the data. auto splits documents, and keeps a chat's newest turns and both ends "
        "of a single text. Answers are never cut.",
        choices=("auto", "trim_start", "trim_middle", "trim_end", "split", "drop", "refuse"),
    )
    train_rows: int | None = option(None, "Use at most this many rows for training; none takes all.", low=1)
    eval_rows: int | None = option(
        30, "Use at most this many rows for the evaluation loss during training; none takes the whole split.", low=1
    )
    test_rows: int | None = option(
        30, "Hold out at most this many rows for the final comparison; none takes the whole split.", low=1
    )
    embedded_train_rows: int | None = option(
        None,
        "A profile's limit on training rows of the embedded corpus alone; setting data.train_rows replaces it.",
        low=1,
    )
    embedded_eval_rows: int | None = option(
        None,
        "A profile's limit on evaluation rows of the embedded corpus alone; setting data.eval_rows replaces it.",
        low=1,
    )
    embedded_test_rows: int | None = option(
        None,
        "A profile's limit on held-out rows of the embedded corpus alone; setting data.test_rows replaces it.",
        low=1,
    )
    seed: int = option(0, "Random seed of the split and of the packing order.", low=0)

    def most_rows(self, split: str) -> int | None:
        """Returns how many rows of `train`, `eval` or `test` are used at most: a profile's limits hold for its own corpus alone."""
        own = getattr(self, f"embedded_{split}_rows") if self.source.startswith("embedded") else None
        return getattr(self, f"{split}_rows") if own is None else own
