"""The model cards of a run's adapter and of an exported run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_helpers.base.config import RunConfig
from qlora_helpers.data.prepared_file import read_prepared_file
from qlora_helpers.evaluation.evaluation_file import read_evaluation
from qlora_helpers.evaluation.metrics.measures import measure_of
from qlora_helpers.evaluation.result import score_cells, scoring_from_dict
from qlora_helpers.evaluation.worth import model_name
from qlora_helpers.export.certificate import FILE, Certificate
from qlora_helpers.runs.folder import Run

if TYPE_CHECKING:
    from qlora_helpers.model.loading import LoadedModel


_CARD_NOTE = "Answers need the prompt that was trained; `chat_template.jinja` writes it (template `{template}` of `qlora_helpers`)."


def export_card(
    run: Run,
    certificate: Certificate,
    *,
    merged: bool,
    licences: str = "",
    run_it: str = "",
    notes: Sequence[str] = (),
) -> str:
    """Writes the card of an export: what it is, its base model and data, its scores, its terms, how to run it, and its limits.

    Args:
        run: the run.
        certificate: of its adapter.
        merged: whether base model and adapter are one.
        licences: the terms of base model and data, in words.
        run_it: the section on how to run it.
        notes: what a person who serves it should know.
    """
    config, adapter = run.config(), run.config().adapter
    prepared = read_prepared_file(run.data_dir)
    source = prepared.source if prepared else "dialogues"  # a name and licence, never a path
    head = ["---", f"base_model: {certificate.base_model}"]
    head += [] if merged else ["library_name: peft"]
    head += ["pipeline_tag: text-generation", f"base_model_relation: {'merge' if merged else 'adapter'}", "---"]
    template = (prepared and prepared.template) or config.data.template
    what = "The base model with its adapter merged in, bfloat16" if merged else "A LoRA adapter"
    lines = [
        *head,
        "",
        f"# {run.name}",
        "",
        f"{what} (r={adapter.r}, alpha={adapter.lora_alpha}) for {certificate.base_model} at revision "
        f"{certificate.base_revision or 'unknown'}, trained on {source}{_task(template)}.",
        "",
        _CARD_NOTE.format(template=template),
        "",
        *(line for note in notes for line in (f"Note: {note}.", "")),
    ]
    lines += _score_lines(run)
    lines += [run_it] if run_it else []
    lines += ["## Licences", "", licences, ""] if licences else []
    lines += [
        f"Certificate: `{FILE}` (adapter sha256 `{certificate.weights_sha256[:16]}`). Like any such model it makes things up.",
        "",
    ]
    return "\n".join(lines)


def _score_lines(run: Run) -> list[str]:
    """Returns the section on the run's scores; empty where it was not evaluated."""
    values = read_evaluation(run)
    if not values:
        return []
    scoring = scoring_from_dict(values.get("scoring", {}))
    header = ["model", *(measure_of(key).label for key in scoring.measures), "answers that end"]
    rows = [
        [model_name(name), *score_cells(score, scoring), f"{score['stop_rate']:.0%}"]
        for name, score in values["scores"].items()
    ]
    table = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    table.insert(1, "|---" * len(header) + "|")
    verdict = values.get("comparisons", {}).get("base", {}).get("verdict")
    said = [f"Tuned against untuned: {verdict}"] if verdict else []
    said += [values["worth"]] if values.get("worth") and not values.get("random_weights") else []
    head = [f"On {len(values['rows'])} held-out rows:", ""]
    return [*head, *table, "", *(line for sentence in said for line in (sentence, ""))]


def _task(template: str) -> str:
    """What the model was trained to do, as far as the template says it."""
    return " to summarise dialogues" if template == "recipe" else ""


def adapter_card(run: Run, config: RunConfig, loaded: LoadedModel) -> str:
    """Writes the card of an adapter that was just trained: base model, adapter, data and prompt."""
    prepared = read_prepared_file(run.data_dir)
    source = prepared.source if prepared else "dialogues"  # a name and licence, never a path
    template = (prepared and prepared.template) or config.data.template
    storage = "in 4-bit NF4 (QLoRA) " if config.model.quantization == "nf4" else ""
    return (
        f"---\nbase_model: {loaded.checkpoint.name}\nlibrary_name: peft\npipeline_tag: text-generation\n---\n\n"
        f"# {run.name}\n\nA LoRA adapter (r={config.adapter.r}, alpha={config.adapter.lora_alpha}) for "
        f"{loaded.checkpoint.name}, trained {storage}on {source}{_task(template)}.\n\n"
        f"Prompt: the `{template}` template of qlora_helpers. Settings: `config.json` beside this file.\n"
    )
