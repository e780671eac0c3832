"""The settings of a run: frozen dataclasses that are read from and written to JSON, with a text for each field.

A field's text serves the notebooks' tables, the command line's help and the widgets' tooltips. Validation collects all mistakes
and raises them in one `ConfigError`. This module knows nothing of torch, models or files.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from qlora_helpers.base.errors import ConfigError
from qlora_helpers.base.setting_values import checked_value, plain_text

Section = TypeVar("Section")


def option(
    default: Any,
    text: str,
    *,
    choices: tuple | None = None,
    low: float | None = None,
    high: float | None = None,
    many_lines: bool = False,
) -> Any:
    """Makes a dataclass field with its help text and limits.

    Args:
        default: the value if none is given.
        text: a sentence that says what the setting does, with its unit.
        choices: the allowed values, or None.
        low: the smallest allowed number, or None.
        high: the largest allowed number, or None.
        many_lines: whether a text may hold line breaks and tabs; the command line writes them as \\n and \\t.
    """
    limits = {"choices": choices, "low": low, "high": high, "many_lines": many_lines}
    return field(default=default, metadata={"text": text, **limits})


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained, and how it is held in memory."""

    name: str = option(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Model to load: a hub id, a local folder, a .gguf file, or random:NAME for a known architecture with random weights.",
    )
    revision: str | None = option(None, "Branch, tag or commit of the hub repository; none takes the default branch.")
    quantization: str = option(
        "nf4",
        "Storage of the frozen linear layers: nf4 holds them in 4 bits (QLoRA), none in the compute type.",
        choices=("nf4", "none"),
    )
    double_quantization: bool = option(
        True, "Quantise the quantisation constants too, which saves about 0.37 bits a parameter."
    )
    compute_dtype: str = option(
        "auto",
        "Data type of matrix multiplications: auto takes bfloat16 on GPUs that support it, float16 on others, float32 on a CPU.",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    attention: str = option(
        "auto",
        "Attention implementation; auto takes PyTorch's scaled dot product attention (sdpa).",
        choices=("auto", "sdpa", "eager"),
    )
    device_map: str = option(
        "auto",
        "Placement: auto spreads the layers over all GPUs, or takes the CPU if there is none; cpu takes the CPU.",
        choices=("auto", "cpu"),
    )
    max_memory_per_gpu_gib: float | None = option(
        None, "Limit on the weights placed on each GPU, GiB; none leaves 10 % of each GPU free.", low=0.1
    )


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA adapters (Hu et al. 2021, arXiv:2106.09685): W + lora_alpha / r * B A, with A and B trained."""

    r: int = option(8, "Rank of the adapters: in how many directions they can change each layer.", low=1, high=1024)
    lora_alpha: int = option(
        32, "Scale of the adapters: their output is multiplied by lora_alpha / r.", low=1, high=4096
    )
    lora_dropout: float = option(
        0.05, "Share of the adapters' inputs that training drops at random, against overfitting.", low=0, high=0.9
    )
    target_modules: tuple[str, ...] | None = option(
        None,
        "Names or paths of the linear layers that get an adapter; none takes all linear layers of the text part.",
    )
    use_rslora: bool = option(
        False, "Scale by lora_alpha / sqrt(r) instead, for high ranks (Kalajdzievski 2023, arXiv:2312.03732)."
    )
    use_dora: bool = option(
        False,
        "Train magnitude and direction separately, which is slower and sometimes better (Liu et al. 2024, arXiv:2402.09353).",
    )


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


@dataclass(frozen=True)
class TrainConfig:
    """How the adapters are trained; the defaults are the 2023 recipe's."""

    epochs: float = option(1.0, "How often training goes through all rows.", low=0.001, high=1000)
    max_steps: int | None = option(None, "Stop after this many optimizer steps, whatever epochs says.", low=1)
    micro_batch_size: int = option(8, "Packed sequences (or padded rows) in one forward pass of each process.", low=1)
    gradient_accumulation_steps: int = option(
        1, "Forward passes whose gradients are added up for one optimizer step.", low=1
    )
    learning_rate: float = option(2e-4, "Peak learning rate of the adapters.", low=1e-8, high=1.0)
    lr_scheduler_type: str = option(
        "linear", "How the learning rate changes after the warm-up.", choices=("linear", "cosine", "constant")
    )
    warmup_steps: int = option(0, "Optimizer steps in which the learning rate rises from zero.", low=0)
    weight_decay: float = option(0.0, "Weight decay of the adapters (AdamW).", low=0, high=1)
    max_grad_norm: float = option(1.0, "Scale the gradients down to this norm where they exceed it.", low=0.001)
    optim: str = option(
        "adamw_torch",
        "Optimizer; the 8-bit ones save GPU memory.",
        choices=("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    )
    activation_checkpointing: bool = option(
        True, "Recompute activations in the backward pass: a step takes up to half as long again, and far less memory."
    )
    checkpointed_layers: int | None = option(
        None,
        "Number of decoder layers with activation checkpointing, if that is on; none takes as few as fit in memory, else all.",
        low=0,
    )
    fast_step: bool = option(
        True,
        "Take fast training steps: block-diagonal attention without a mask, the loss in chunks, adapters in the model's data type.",
    )
    compile: str = option(
        "auto",
        "Compile each decoder layer (CUDA only): auto does so if the run is long enough to win the time back.",
        choices=("auto", "on", "off"),
    )
    cuda_graph: bool = option(
        True,
        "Capture forward and backward passes as CUDA graphs and replay them, for packed sequences on one GPU without dropout.",
    )
    matmul_dtype: str = option(
        "bfloat16",
        "Multiply frozen 4-bit weights in bfloat16, or in FP8 (Ada, Hopper and newer): auto takes FP8 where it was measured and is "
        "faster.",
        choices=("bfloat16", "fp8", "auto"),
    )
    offload_embeddings: bool = option(
        False,
        "Keep the input embedding in CPU memory, which frees its bytes on the GPU; each forward pass copies the rows it needs.",
    )
    offload_checkpoints: bool = option(
        False,
        "Keep the inputs of layers with activation checkpointing in CPU memory until the backward pass: longer batches fit on a "
        "small card, and copies go on beside the computation.",
    )
    share: str = option(
        "auto",
        "How several GPUs work together: copies (each has the whole 4-bit model and its own rows), shards (each holds a part of "
        "every layer and gathers the others' parts when it computes that layer), copies of shards (shards within a machine, "
        "copies between machines), spread (the layers lie one after another on the GPUs), or one (a single GPU). auto: as "
        "the plan finds fastest on the free GPUs; processes whose number is given hold copies.",
        choices=("auto", "one", "copies", "shards", "copies of shards", "spread"),
    )
    logging_steps: int = option(2, "Write a line of progress every so many optimizer steps.", low=1)
    eval_steps: int | None = option(
        None, "Compute the evaluation loss every so many optimizer steps; none does it after each epoch.", low=1
    )
    save_steps: int | None = option(
        None, "Save a checkpoint every so many optimizer steps; none does it after each epoch.", low=1
    )
    checkpoints_kept: int = option(2, "How many verified checkpoints are kept.", low=1, high=100)
    stop_at_usd: float | None = option(
        None, "Save and stop once all sessions of the run together have cost this much, USD.", low=0.0001
    )
    stop_at_minutes: float | None = option(
        None, "Save and stop this many minutes after the session began, loading included.", low=0.001
    )
    patience: int | None = option(
        None, "Save and stop after this many evaluations in a row without a lower evaluation loss.", low=1
    )
    usd_per_hour: float | None = option(
        None,
        "Price of this machine, USD an hour; none takes the catalogue's price on SageMaker, and no price elsewhere.",
        low=0,
    )
    tensorboard: str = option(
        "local", "Where TensorBoard events go: local (the run's folder), an s3://bucket/prefix, or off."
    )
    report_to: tuple[str, ...] | None = option(
        None,
        "Hand the figures to these trackers, too, if they are installed: wandb, mlflow, trackio; how is their own configuration.",
    )
    seed: int = option(42, "Random seed of the adapters, the order of the rows and the dropout.", low=0, high=2**32 - 1)


@dataclass(frozen=True)
class EvaluationConfig:
    """How the base and the tuned model answer the held-out rows."""

    batch_size: int = option(16, "Rows that are answered at once.", low=1)
    max_new_tokens: int = option(80, "Longest answer, tokens.", low=1)
    do_sample: bool = option(False, "Sample the answers instead of taking the most likely token (greedy decoding).")
    temperature: float = option(0.7, "Sampling temperature, if do_sample is on.", low=0.01, high=10)
    top_p: float = option(
        0.9, "Sample from the most likely tokens whose probabilities add up to this share.", low=0.01, high=1
    )
    chat_baseline: bool = option(True, "Also ask the untuned model with its own chat template, if it has one.")
    few_shot: int = option(
        3,
        "Also ask the untuned model with so many training examples in the prompt, as far as they fit; 0 does not.",
        low=0,
        high=8,
    )
    metric: str = option(
        "auto",
        "How answers are scored: auto chooses by the training answers; text is ROUGE and chrF, labels accuracy and macro-F1, "
        "json the F1 of fields, exact the share of equal answers, numbers the share of right ones.",
        choices=("auto", "text", "labels", "json", "exact", "numbers"),
    )
    tolerance: float = option(
        0.0, "For numbers: by which share of the reference a right answer may be off.", low=0, high=1
    )
    json_schema: str | None = option(
        None, "For JSON: a file with a JSON schema that answers are checked against; none checks against no schema."
    )


@dataclass(frozen=True)
class RunConfig:
    """All settings of one run; what `config.json` holds."""

    profile: str = option("demo", "The profile that the run started from.")
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain values, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def with_settings(self, settings: Iterable[str] | Mapping[str, Any]) -> RunConfig:
        """Returns a copy with some settings changed.

        Args:
            settings: `["train.max_steps=20", ...]` as on the command line, or `{"train.max_steps": 20, ...}`.

        Raises:
            ConfigError: names are unknown or values are wrong; the message lists all of them.
        """
        return _changed(self, settings)


TRACKERS = ("wandb", "mlflow", "trackio")
"""What `train.report_to` may name."""

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "evaluation": EvaluationConfig,
}


# Settings that run folders of earlier versions hold under other names
RENAMED = {"train.recompute_layers": "train.checkpointed_layers"}

# Values of settings that they hold under other names
RENAMED_VALUES = {
    ("data.loss_on", "summary"): "answer",
    ("data.long_rows", "trim"): "trim_end",
}


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Builds a `RunConfig` from nested plain values, as `config.json` holds them; missing settings take their defaults.

    Raises:
        ConfigError: names are unknown or values are wrong; the message lists all of them.
    """
    if not isinstance(values, Mapping):
        raise ConfigError([f"config: expected an object with {', '.join(SECTIONS)}, got {type(values).__name__}"])
    flat: dict[str, Any] = {}
    problems = []
    for name, value in values.items():
        if name == "profile":
            flat["profile"] = value
        elif name in SECTIONS and isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        elif name in SECTIONS:
            problems.append(f"{name}: expected an object, got {json.dumps(value, default=str)}")
        else:
            problems.append(f"{name}: unknown; the sections are {', '.join(SECTIONS)}")
    return _changed(RunConfig(), flat, problems)


def value_today(name: str, value: Any) -> Any:
    """Returns a setting's value under today's name, if run folders of earlier versions hold it under another."""
    return RENAMED_VALUES.get((name, value), value) if isinstance(value, str) else value


def describe(section: type | Any) -> list[dict[str, Any]]:
    """Describes a section's fields, each as `name`, `value` (the default, or the instance's), `text`, `choices`, `low`, `high`."""
    instance = section() if isinstance(section, type) else section
    return [
        {"name": item.name, "value": getattr(instance, item.name), **item.metadata}
        for item in dataclasses.fields(instance)
    ]


def _changed(
    config: RunConfig, settings: Iterable[str] | Mapping[str, Any], problems: list[str] | None = None
) -> RunConfig:
    problems = list(problems or [])
    changes: dict[str, dict[str, Any]] = {}
    for name, value, is_text in _pairs(settings, problems):
        if name == "profile":
            try:
                config = replace(config, profile=plain_text(value))
            except ValueError as error:
                problems.append(f"profile: {error}")
            continue
        section, _, key = RENAMED.get(name, name).partition(".")
        value = value_today(name, value)
        known = {item.name: item for item in dataclasses.fields(SECTIONS[section])} if section in SECTIONS else {}
        if key not in known:
            problems.append(f"{name}: unknown{_did_you_mean(name)}")
            continue
        try:
            changes.setdefault(section, {})[key] = checked_value(SECTIONS[section], known[key], value, is_text)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    _replace_limits(config.data, changes.get("data", {}))
    for section, values in changes.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    problems += _contradictions(config)
    if problems:
        raise ConfigError(problems)
    return config


def _replace_limits(data: DataConfig, changes: dict[str, Any]) -> None:
    """Takes away a profile's limit on the embedded corpus's rows where a person sets or changes the limit on all rows."""
    for split in ("train", "eval", "test"):
        name, own = f"{split}_rows", f"embedded_{split}_rows"
        if name in changes:
            given, changed = own in changes, changes[name] != getattr(data, name)
            if not given or (changed and changes[own] == getattr(data, own)):
                changes[own] = None


def _pairs(settings: Iterable[str] | Mapping[str, Any], problems: list[str]) -> list[tuple[str, Any, bool]]:
    if isinstance(settings, Mapping):
        return [(name, value, False) for name, value in settings.items()]
    pairs = []
    for text in [settings] if isinstance(settings, str) else settings:
        name, equals, value = text.partition("=")
        if equals:
            pairs.append((name.strip(), value.strip(), True))
        else:
            problems.append(f"{text}: expected section.name=value, such as train.max_steps=20")
    return pairs


def _did_you_mean(name: str) -> str:
    known = [f"{section}.{item.name}" for section, kind in SECTIONS.items() for item in dataclasses.fields(kind)]
    by_key = [full for full in known if full.split(".")[1] == name.split(".")[-1]]
    close = by_key or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; the sections are {', '.join(SECTIONS)}"


def _contradictions(config: RunConfig) -> list[str]:
    problems = []
    if unknown := [name for name in config.train.report_to or () if name not in TRACKERS]:
        problems.append(f"train.report_to: expected some of {', '.join(TRACKERS)}, or none, got {', '.join(unknown)}")
    tensorboard = config.train.tensorboard
    if tensorboard not in ("local", "off"):
        bucket, _, prefix = tensorboard.removeprefix("s3://").partition("/")
        if not tensorboard.startswith("s3://") or not bucket or not prefix:
            problems.append(
                f"train.tensorboard: expected local, off or s3://bucket/prefix (a prefix is needed), got {tensorboard!r}"
            )
    if config.evaluation.max_new_tokens >= config.data.seq_len_tokens:
        problems.append(
            f"evaluation.max_new_tokens: expected less than data.seq_len_tokens ({config.data.seq_len_tokens}), so that a "
            f"prompt has room, got {config.evaluation.max_new_tokens}"
        )
    return problems
