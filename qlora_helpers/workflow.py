"""A whole run: composes the steps, and alone owns a run's state and its lock.

What the command line, `train(run)` in a cell and torchrun all enter. Each function takes a run, finds what earlier steps left
in its folder, does one step and writes what it made. Steps know nothing of each other; here is where they meet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers import locks, rescue, termination
from qlora_helpers.architectures import keeps_packed_rows_apart
from qlora_helpers.config import RunConfig, profile_config
from qlora_helpers.errors import RunError, UserError
from qlora_helpers.heartbeat import beating
from qlora_helpers.price import needed_price
from qlora_helpers.run import Run, find_runs, read_json, replaced_folder, runs_root, write_json
from qlora_helpers.status import BY_REQUEST, INTERRUPTED
from qlora_helpers.trained_on import refuse_other_than_trained_on
from qlora_helpers.training_budget import refuse_spent_budget

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from qlora_helpers.blocks import PreparedData
    from qlora_helpers.certificate import Certificate
    from qlora_helpers.evaluation import Answer, Evaluation
    from qlora_helpers.models import LoadedModel
    from qlora_helpers.training import TrainResult

Say = Callable[[str], None]
log = logging.getLogger(__name__)
RELOAD_TOLERANCE = 1e-4
TENSORBOARD_SAMPLES = 3
# Adapters are switched and modes set on the model itself: a panel's thread must wait its turn.
_MODEL_IN_USE = threading.RLock()


def open_run(
    name: str | os.PathLike[str] = "demo",
    *,
    profile: str | None = None,
    settings: Iterable[str] | dict[str, Any] = (),
    root: str | os.PathLike[str] | None = None,
) -> Run:
    """Opens a run, making it where it is new.

    Args:
        name: the run's name below `root`, or a path.
        profile: starts a new run from a profile; `$QLORA_PROFILE` or `demo` where none is given.
        settings: changes to the settings, as `["train.max_steps=20"]`.
        root: the folder that holds the runs; `$QLORA_RUNS`, else `runs`.

    Raises:
        ConfigError: unknown or wrong settings; all of them at once.
        RunError: a setting that can't change once training has begun, with the difference.
    """
    run = _run_at(name, root)
    old = run.config() if run.exists() else None
    if old is None or (profile is not None and profile != old.profile):
        config = profile_config(profile or os.environ.get("QLORA_PROFILE") or "demo")
    else:
        config = old
    config = config.with_settings(settings)
    if config != old:
        run.change_config(config)
    return run


def _run_at(name: str | os.PathLike[str], root: str | os.PathLike[str] | None) -> Run:
    # Path("").name and Path(".").name are empty: below the root they would be the root itself.
    is_path = os.sep in str(name) or not Path(name).name
    return Run(Path(name) if is_path else runs_root(root) / name)


def existing_run(name: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None) -> Run:
    """Opens a run that must be there.

    Raises:
        RunError: it is not; the message names the runs that are.
    """
    run = _run_at(name, root)
    if not run.exists():
        there = ", ".join(found.name for found in find_runs(run.folder.parent)) or "none"
        raise RunError(f"there is no run {run.name!r}", got=f"these runs: {there}", next_step="Train one first.")
    return run


@rescue.rescued
def load(run: Run, *, say: Say = print) -> LoadedModel:
    """Loads the run's base model and tokenizer, audited."""
    from qlora_helpers.models import load_model

    return load_model(run.config().model, say=say)


def add_adapters(run: Run, loaded: LoadedModel) -> PeftModel:
    """Puts fresh adapters on a loaded model, as the run's settings say."""
    from qlora_helpers import lora

    config = run.config()
    return lora.add_adapters(loaded.model, config.adapter, seed=config.train.seed)


def check_source(run: Run) -> None:
    """Reads the data once before gigabytes of model are loaded, so that a mistake in it is told at once.

    Raises:
        DataError: the source can't be read or used.
    """
    from qlora_helpers.sources import read_corpus

    if not (run.data_dir / "prepared.json").exists():
        read_corpus(run.config().data)


def prepare_data(
    run: Run, tokenizer: PreTrainedTokenizerBase, *, shape: dict[str, Any], say: Say = print
) -> PreparedData:
    """The run's labelled and packed data: what is there if it still fits the settings, else made and saved.

    Args:
        run: the run.
        tokenizer: the model's.
        shape: the model's `config.json`; says whether packed rows can be kept apart.
        say: told what takes long.
    """
    from qlora_helpers.data import content_marks, prepared
    from qlora_helpers.sources import read_corpus

    refuse_other_than_trained_on(run, content_marks(run.config().data, tokenizer))
    config = run.config().data
    can_pack = keeps_packed_rows_apart(shape, config.seq_len_tokens)
    data = prepared(config, tokenizer, run.data_dir, read=read_corpus, can_pack=can_pack)
    if not data.report.passed:
        raise UserError(
            "the label report failed: " + "; ".join(data.report.problems),
            next_step="Look at it in notebook 03 before training.",
        )
    return data


@rescue.rescued
def train(
    run: Run,
    *,
    model: PeftModel | None = None,
    loaded: LoadedModel | None = None,
    show_progress: bool = True,
    shut_down_app: bool = False,
    say: Say = print,
) -> TrainResult:
    """Trains the run's adapters, or goes on from its newest good checkpoint, and saves the adapter.

    Args:
        run: the run.
        model: the model with adapters, where it is in memory already.
        loaded: the base model that `model` stands on, or that gets adapters here.
        show_progress: whether progress is drawn: a live panel in a notebook, Trainer's bar elsewhere.
        shut_down_app: shut the SageMaker Studio app down when the training has ended, unless a person stopped it.
        say: told what takes long.

    Raises:
        RunError: another process trains this run or uses its GPUs, its dollars are used up, or training ended badly; the last good
            checkpoint is intact.
    """
    from qlora_helpers import training
    from qlora_helpers.data import content_marks
    from qlora_helpers.events import event_callback
    from qlora_helpers.training_callback import CallEachTime

    config = run.config()
    main = is_main_process()
    show_progress = show_progress and not _prints_into(run.log_path)
    with contextlib.ExitStack() as owned, contextlib.ExitStack() as undone:
        redraw = owned.enter_context(_shown_in_cell(run)) if show_progress and main else None
        owned.enter_context(termination.heard())
        if main:
            owned.enter_context(_owned(run, shut_down_app=shut_down_app))
        if redraw:
            redraw()
        refuse_other_than_trained_on(run)
        if loaded is None:
            if main:
                check_source(run)
            loaded = load(run, say=say)
        model = model or undone.enter_context(_adapters_on(run, loaded))
        with _main_process_first(loaded):
            data = prepare_data(run, loaded.tokenizer, shape=loaded.model.config.to_dict(), say=say)
        marks = content_marks(config.data, loaded.tokenizer) | loaded.checkpoint.marks
        events = event_callback(run, config, samples=_samples(data)) if main else None
        with _MODEL_IN_USE, contextlib.closing(events) if events else contextlib.nullcontext():
            callbacks = [events] if events else []
            callbacks += [CallEachTime(redraw)] if redraw else []
            result = training.train(
                model, loaded.tokenizer, data, config.train, run,
                extra_callbacks=tuple(callbacks), show_progress=show_progress and not redraw,
                trained_on=refuse_other_than_trained_on(run, marks),
            )  # fmt: skip
        if main:
            log.info("%s", result)
            save_adapter(run, model, loaded)
            if not termination.asked():  # seconds are left; the session that goes on certifies
                log.info("certificate:\n%s", certify(run, model, loaded, data))
            if result.new_steps:  # nothing is measured where nothing was left to train
                _write_measured(run, model, loaded, result, data)
            run.set_status(
                state="stopped" if result.stopped else "finished",
                step=result.steps,
                exit_reason=result.stop_reason or "all steps are done",
            )
    return result


@contextlib.contextmanager
def _adapters_on(run: Run, loaded: LoadedModel) -> Iterator[PeftModel]:
    """Fresh adapters on a model; taken off again where the session fails, so that the next one can add its own."""
    from qlora_helpers import lora

    model = add_adapters(run, loaded)
    try:
        yield model
    except BaseException:
        lora.remove_adapters(model)
        raise


@rescue.rescued
def retry(
    run: Run,
    *,
    model: PeftModel | None = None,
    loaded: LoadedModel | None = None,
    settings: Iterable[str] | dict[str, Any] | None = None,
    show_progress: bool = True,
    say: Say = print,
) -> TrainResult:
    """Goes on with a run that failed, from its last good checkpoint and without a restart of the process.

    Args:
        run: the run.
        model, loaded: as for `train`.
        settings: changes to the settings. None takes, after the run was out of memory, the fastest that should fit.
        show_progress, say: as for `train`.

    Raises:
        RunError: see `train`; a setting that can't change once training has begun.
    """
    settings = rescue.next_settings(run) if settings is None else settings
    if settings:
        run.change_config(run.config().with_settings(settings))
        say("Going on with " + ", ".join(settings))
    return train(run, model=model, loaded=loaded, show_progress=show_progress, say=say)


@rescue.rescued
def evaluate(
    run: Run, *, model: PeftModel | None = None, loaded: LoadedModel | None = None, say: Say = print
) -> Evaluation:
    """Asks base and tuned model the run's held-out rows and writes `evaluation.json`.

    Args:
        run: a run with a saved adapter.
        model: the tuned model, where it is in memory already; else the adapter is loaded onto the base.
        loaded: the base model that `model` stands on.
        say: told what takes long.
    """
    from qlora_helpers import evaluation
    from qlora_helpers.events import write_answers

    config = run.config()
    if model is None or loaded is None:
        loaded = load(run, say=say)
        model = load_adapter(run, loaded)
    data = prepare_data(run, loaded.tokenizer, shape=model.config.to_dict(), say=say)
    with _MODEL_IN_USE:
        result = evaluation.evaluate(
            model, loaded.tokenizer, data.test, config.evaluation, template=config.data.template,
            max_tokens=config.data.seq_len_tokens, train_keys=data.train_keys,
        )  # fmt: skip
    write_json(run.evaluation_path, result.to_dict() | {"random_weights": loaded.checkpoint.is_random})
    write_answers(run, config, *_answers(result))
    return result


@rescue.rescued
def ask(
    run: Run,
    model: PeftModel,
    loaded: LoadedModel,
    dialogue: str,
    *,
    tuned: bool = True,
    sampled: bool = False,
    seed: int = 0,
) -> Answer:
    """Has one dialogue summarised, in the prompt that the run was trained with.

    Args:
        run: the run; its evaluation settings say how long an answer may be, and how it is sampled.
        model: the tuned model.
        loaded: the base model that `model` stands on.
        dialogue: turns, one a line; its end is cut off where it is too long for the run's block.
        tuned: False switches the adapters off, so the base model answers.
        sampled: draw the tokens by their likelihood instead of taking the likeliest each time.
        seed: of the draw.
    """
    from qlora_helpers import evaluation

    config = run.config()
    settings = dataclasses.replace(config.evaluation, do_sample=sampled)
    prompt = _prompt(config, loaded, dialogue)
    with _MODEL_IN_USE, contextlib.nullcontext() if tuned else model.disable_adapter():
        return evaluation.generate(model, loaded.tokenizer, [prompt], settings, seed=seed)[0]


def _prompt(config: RunConfig, loaded: LoadedModel, dialogue: str) -> list[int]:
    """A dialogue's prompt as tokens, its dialogue trimmed so that prompt and answer fit into a block."""
    from qlora_helpers.prompts import prompt_tokens

    tokens = prompt_tokens(dialogue, config.data.template, loaded.tokenizer)
    room = config.data.seq_len_tokens - config.evaluation.max_new_tokens
    return tokens.trimmed(max(0, len(tokens) - room)).ids


def streaming_answers(run: Run, model: PeftModel, loaded: LoadedModel) -> Callable[..., Iterator[str]]:
    """A function that answers dialogues in pieces, as `widgets.answer_panel` takes it: one answer at a time, whoever asks.

    Args:
        run: the run; its template and block length hold.
        model: the tuned model; its adapters are off while the base model answers.
        loaded: the base model that `model` stands on.

    Returns:
        `answer(dialogue, *, tuned, temperature, top_p, max_new_tokens)`, an iterator of texts; temperature 0 takes the likeliest
        token each time. It raises ConfigError where these settings can't be, such as an answer longer than the block.
    """
    from qlora_helpers import generation

    def answer(dialogue: str, *, tuned: bool, temperature: float, top_p: float, max_new_tokens: int) -> Iterator[str]:
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
        )
        settings = {f"evaluation.{key}": value for key, value in sampling.items()}
        config = run.config().with_settings(settings | {"evaluation.max_new_tokens": max_new_tokens})
        prompt = _prompt(config, loaded, dialogue)
        with _MODEL_IN_USE, contextlib.nullcontext() if tuned else model.disable_adapter():
            yield from generation.stream(model, loaded.tokenizer, prompt, config.evaluation)

    return answer


def save_adapter(run: Run, model: PeftModel, loaded: LoadedModel) -> None:
    """Writes the adapter, the tokenizer and the run's settings into `adapter/`, whole or not at all."""
    config = run.config()
    with replaced_folder(run.adapter_dir) as folder:
        # 'auto' would ask the hub whether the embedding was resized; it never is here.
        model.save_pretrained(folder, save_embedding_layers=False)
        loaded.tokenizer.save_pretrained(folder)
        settings = read_json(folder / "adapter_config.json")
        settings["base_model_name_or_path"] = loaded.checkpoint.name
        settings["revision"] = loaded.checkpoint.revision
        write_json(folder / "adapter_config.json", settings)
        write_json(folder / "config.json", config.to_dict())
        (folder / "README.md").write_text(_model_card(run, config, loaded), encoding="utf-8")


def _model_card(run: Run, config: RunConfig, loaded: LoadedModel) -> str:
    prepared = run.data_dir / "prepared.json"
    source = read_json(prepared)["source"] if prepared.exists() else "dialogues"  # a name and licence, never a path
    storage = "in 4-bit NF4 (QLoRA) " if config.model.quantization == "nf4" else ""
    return (
        f"---\nbase_model: {loaded.checkpoint.name}\nlibrary_name: peft\npipeline_tag: text-generation\n---\n\n"
        f"# {run.name}\n\nA LoRA adapter (r={config.adapter.r}, alpha={config.adapter.lora_alpha}) for "
        f"{loaded.checkpoint.name}, trained {storage}on {source} to summarise dialogues.\n\n"
        f"Prompt: the `{config.data.template}` template of qlora_helpers. Settings: `config.json` beside this file.\n"
    )


def load_adapter(run: Run, loaded: LoadedModel) -> PeftModel:
    """Puts the run's saved adapter on a freshly loaded base model.

    Raises:
        RunError: the run has no adapter yet.
    """
    from qlora_helpers import lora

    run.need(run.adapter_dir / "adapter_model.safetensors", "Notebook 04_train (or `python -m qlora_helpers train`)")
    return lora.load_adapter(loaded.model, run.adapter_dir)


def certify(run: Run, model: PeftModel, loaded: LoadedModel, data: PreparedData, *, prompts: int = 3) -> Certificate:
    """Compares the saved adapter with the live one and writes `adapter/certificate.json`, whatever was found.

    Args:
        run: a run whose adapter was just saved.
        model: the model in memory that it was saved from.
        loaded: the base model that `model` stands on.
        data: its held-out rows are asked.
        prompts: how many.
    """
    from qlora_helpers import certificate

    asked = {"prompts": 0, "largest_difference": None, "same_answers": 0}
    expected = certificate.expected_tensors(model)
    try:
        with _MODEL_IN_USE:
            live = answered(run, model, loaded, data, prompts)
            with certificate.saved_weights_in_place(model, run.adapter_dir):
                saved = answered(run, model, loaded, data, prompts)
            asked = compared(live, saved)
    except (RuntimeError, OSError, ValueError, KeyError) as error:  # a damaged file: the certificate names its tensors
        log.warning("the saved adapter was not asked: %s: %s", type(error).__name__, error)
    prepared = run.data_dir / "prepared.json"
    checkpoint = loaded.checkpoint
    return certificate.certify(
        run.adapter_dir, expected, asked=asked, versions=versions(),
        base={"name": checkpoint.name, "revision": checkpoint.revision,
              "sha256": certificate.base_fingerprint(checkpoint.folder)},
        data_fingerprint=read_json(prepared)["fingerprint"] if prepared.exists() else None,
    )  # fmt: skip


def answered(
    run: Run, model: PeftModel, loaded: LoadedModel, data: PreparedData, prompts: int
) -> tuple[list[Any], list[Answer]]:
    """Next-token logits and short greedy answers to the first held-out prompts, in the prompt that was trained."""
    from qlora_helpers import evaluation
    from qlora_helpers.prompts import prompt_tokens

    config = run.config()
    questions = []
    for item in data.test[:prompts]:
        tokens = prompt_tokens(item.dialogue, config.data.template, loaded.tokenizer)
        questions.append(tokens.trimmed(max(0, len(tokens) - config.data.seq_len_tokens)).ids)
    most = min(20, config.evaluation.max_new_tokens)
    short = dataclasses.replace(config.evaluation, do_sample=False, max_new_tokens=most)
    logits = evaluation.next_token_logits(model, questions)
    return logits, evaluation.generate(model, loaded.tokenizer, questions, short)


def compared(first: tuple[list[Any], list[Answer]], second: tuple[list[Any], list[Answer]]) -> dict[str, Any]:
    """What two models' `answered` have in common."""
    differences = [float((one - other).abs().max()) for one, other in zip(first[0], second[0], strict=True)]
    same = sum(one == other for one, other in zip(first[1], second[1], strict=True))
    worst = max(differences, key=lambda value: (value != value, value))  # not a number counts as the worst
    return {"prompts": len(differences), "largest_difference": worst, "same_answers": same}


@dataclass(frozen=True)
class ReloadCheck:
    """Whether the saved adapter on a freshly loaded base model is the model that was trained.

    Attributes:
        largest_difference: between next-token logits of the two on `prompts` held-out prompts.
        same_answers: answers that are equal to the letter.
    """

    prompts: int
    largest_difference: float
    same_answers: int

    @property
    def passed(self) -> bool:
        return self.same_answers == self.prompts and self.largest_difference <= RELOAD_TOLERANCE

    def __repr__(self) -> str:
        verdict = "the reloaded model is the trained one" if self.passed else "the reloaded model DIFFERS"
        return f"{verdict}: {self.same_answers} of {self.prompts} answers equal, logits within {self.largest_difference:.1e}"


@rescue.rescued
def check_reload(run: Run, model: PeftModel, loaded: LoadedModel, *, prompts: int = 3, say: Say = print) -> ReloadCheck:
    """Loads base and adapter again from disk and compares them with the model in memory; `plan.json` keeps the outcome.

    Raises:
        RunError: they differ.
    """
    data = prepare_data(run, loaded.tokenizer, shape=model.config.to_dict(), say=say)
    fresh = load(run, say=say)
    reloaded = load_adapter(run, fresh)
    with _MODEL_IN_USE:
        both = [answered(run, each, fresh, data, prompts) for each in (model, reloaded)]
    check = ReloadCheck(**compared(*both))
    add_to_plan(run, reload=dataclasses.asdict(check))
    if not check.passed:
        raise RunError(str(check), next_step="Train again; the saved adapter is not the one that was trained.")
    return check


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
    return {name: importlib.metadata.version(name) for name in names}


def is_main_process() -> bool:
    """True but in the second and later processes of a torchrun job."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def _main_process_first(loaded: LoadedModel) -> Iterator[None]:
    """Under torchrun the first process prepares the data, the others then read it."""
    if "RANK" not in os.environ:
        yield
        return
    from accelerate import PartialState

    with PartialState(cpu=str(loaded.model.device) == "cpu").main_process_first():
        yield


@contextlib.contextmanager
def _owned(run: Run, *, shut_down_app: bool = False) -> Iterator[None]:
    """Keeps a second trainer off this run and its GPUs, writes the log, and leaves a true status whatever happens."""
    with locks.run_lock(run), _logged_to(run.log_path):
        began = False
        try:
            config = run.config()
            refuse_spent_budget(config.train, run.status())
            price = needed_price(config.train)
            gpus = locks.visible_gpus() if config.model.device_map != "cpu" else ()
            with locks.gpu_locks(run, gpus):
                session = run.open_session(usd_per_hour=price.usd_per_hour if price else None).session
                began = True
                with beating(run, session):
                    yield
            run.answer_all("the training had ended already")
        except BaseException as error:
            reason = INTERRUPTED if isinstance(error, KeyboardInterrupt | SystemExit) else "an error"
            log.error("training ended: %s: %s", type(error).__name__, error)
            with contextlib.suppress(RunError):  # a full disk must not hide why
                run.set_status(state="failed", exit_reason=reason, last_error=f"{type(error).__name__}: {error}"[:2000])
                run.answer_all("the training failed first")
            raise
        finally:
            if shut_down_app and began:
                _shut_app_down(run)


def _shut_app_down(run: Run) -> None:
    """Shuts the Studio app down, unless a person ended the training or another one goes on beside it."""
    from qlora_helpers.cleanup_sagemaker import stop_this_app

    if run.status().exit_reason in (INTERRUPTED, BY_REQUEST, termination.REASON):
        return
    try:
        locks.refuse_taken_gpus(locks.visible_gpus())
        log.warning("shutting down this app: %s", stop_this_app())
    except UserError as error:
        log.warning("the app was not shut down: %s", error)


def _shown_in_cell(run: Run) -> contextlib.AbstractContextManager[Callable[[], None] | None]:
    """A live panel below the notebook cell that trains, as a function that redraws it; None outside a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if getattr(shell, "kernel", None) is None:
        return contextlib.nullcontext()
    from qlora_helpers.widgets import shown_in_cell

    return shown_in_cell(run)


def _prints_into(path: Path) -> bool:
    """Whether what this process prints goes into a file already, as that of a background process does."""
    try:
        return os.path.samestat(os.fstat(2), path.stat())
    except OSError:
        return False


@contextlib.contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    # transformers prints its warnings besides: where that goes into the same file, once is enough.
    names = ("qlora_helpers",) if _prints_into(path) else ("qlora_helpers", "transformers")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in names:
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("qlora_helpers").setLevel(logging.INFO)
    try:
        yield
    finally:
        handler.close()
        for name in names:
            logging.getLogger(name).removeHandler(handler)


def _write_measured(run: Run, model: PeftModel, loaded: LoadedModel, result: TrainResult, data: PreparedData) -> None:
    """What was measured into `plan.json`, and on GPUs beside it what should have been."""
    from qlora_helpers.lora import count_parameters

    count = count_parameters(model)
    measured = {
        "weights_gib": loaded.audit.gib_by_device, "peak_gib": result.peak_gib, "reserved_gib": result.reserved_gib,
        "seconds": round(result.seconds, 1), "tokens_per_s": round(result.tokens_per_s, 1), "steps": result.steps,
        "trainable_parameters": count.trainable, "parameters": count.total, "published_parameters": count.published_total,
        "machine": result.machine, "fast_step": result.fast_step.splitlines(), "versions": versions(),
    }  # fmt: skip
    add_to_plan(run, measured=measured)
    if not result.fast_step or result.machine == "CPU":
        return
    from qlora_helpers.planning import predicted_step, this_machine

    holding = sum(name.startswith("cuda") for name in loaded.audit.gib_by_device)  # one a process under torchrun
    try:
        predicted = predicted_step(
            run.config(), hardware=dataclasses.replace(this_machine(), gpus=holding), compiled=result.compiled,
            recomputed=result.recomputed,
            trained_share=data.report.trained_tokens / data.report.tokens,
            fill=data.report.tokens / (len(data.train) * data.seq_len_tokens) if data.packed else 1.0,
        )  # fmt: skip
    except UserError as error:  # a shape that is not catalogued, or no NVML: the run itself is fine
        log.warning("no prediction beside the measured memory: %s", error)
    else:
        add_to_plan(run, predicted=predicted)


def add_to_plan(run: Run, **found: Any) -> None:
    """Writes what was found into the run's `plan.json`, beside what is there."""
    old = read_json(run.plan_path) if run.plan_path.exists() else {}
    write_json(run.plan_path, old | found)


def _samples(data: PreparedData) -> dict[str, dict[str, str]]:
    """What TensorBoard shows of the held-out rows before they are answered."""
    return {row.id: {"dialogue": row.dialogue, "its summary": row.summary} for row in data.test[:TENSORBOARD_SAMPLES]}


def _answers(result: Evaluation) -> tuple[dict[str, dict[str, str]], dict[str, float]]:
    """The same rows with their answers, and the scores that TensorBoard lays over those of other runs."""
    samples = {
        row["id"]: {"dialogue": row["dialogue"], "its summary": row["summary"]}
        | {f"answer of {model}": answer["text"] for model, answer in row["answers"].items()}
        for row in result.to_dict()["rows"][:TENSORBOARD_SAMPLES]
    }
    return samples, {f"rouge_l_{model}": scores.rouge_l for model, scores in result.scores.items()}
