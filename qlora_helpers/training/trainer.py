"""Extends `transformers.Trainer`: it counts tokens, averages losses over tokens, watches them, and saves checkpoints safely.

Knows nothing of runs, people or status; `train` makes it and `callback` reports its progress to the run folder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from qlora_helpers.base.errors import RunError
from qlora_helpers.base.files import write_json
from qlora_helpers.base.place import at
from qlora_helpers.base.records import read_record
from qlora_helpers.model.wiring import in_eval_mode, row_losses
from qlora_helpers.runs import sigterm
from qlora_helpers.training import checkpoints as saved
from qlora_helpers.training.averaging import average_gradients
from qlora_helpers.training.checkpoint_choice import after_failure
from qlora_helpers.training.fast_step.loss import chunked_row_losses
from qlora_helpers.training.fast_step.parts import FastStep
from qlora_helpers.training.global_batch import Processes, write_processes
from qlora_helpers.training.health import Evidence
from qlora_helpers.training.loss_watch import LossWatch, rows_in_words
from qlora_helpers.training.processes import files_to_first, from_first, several_machines, values_of_all
from qlora_helpers.training.rank_failures import CommonFailure


@dataclass(frozen=True)
class _LossSum:
    """What `loss_sum_*.json` of a checkpoint holds; checkpoints of earlier versions have no `overflows` or no `health`."""

    loss: float
    since_step: int
    recent: tuple[float, ...]
    overflows: int = 0
    health: Evidence = Evidence()


class _OptimizerPlace(TrainerCallback):
    """Names the optimizer's step as the place of errors; the optimizer is there once training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        optimizer.step = at("optimizer")(optimizer.step)


class SummaryTrainer(Trainer):
    """A `Trainer` that counts tokens, evaluates the loss over tokens, watches the training loss and saves safely.

    Trainer's own `eval_loss` is a mean over batches, which depends on the batch size where rows differ in length. Its own
    checkpoint grows under its final name, and lacks the loss summed since the last log.
    """

    tokens_seen: torch.Tensor | int = 0
    fast: FastStep | None = None
    trained_on: dict[str, Any] | None = None  # what can't change in later sessions
    _saves_to: Path | None = None
    _pass = 0  # of the optimizer step that is being taken
    control: Any  # Trainer makes it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch = LossWatch(may_overflow=self.args.fp16)
        self._blocks: deque[torch.Tensor | None] = deque()
        if self.accelerator.num_processes > 1:
            # accelerate would wrap the model in DDP, which refuses layers that are shared out and splits captured passes: the
            # gradients are averaged after the passes instead. What else it does to a model (autocast) it does here too.
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = lambda model, *args, **kwargs: prepare(
                model, *args, **kwargs | {"evaluation_mode": True}
            )
        # Trainer has no methods of its own around these two.
        self.accelerator.backward = at("backward")(self.accelerator.backward)
        self.add_callback(_OptimizerPlace())

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """Counts the tokens without padding; the sum stays on the device until it is logged."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._blocks = deque(batch.pop("sequences", None) for batch in batches)
        self._pass = 0
        pad = self.data_collator.pad_token_id
        self.tokens_seen = self.tokens_seen + sum(batch["input_ids"].ne(pad).sum() for batch in batches)
        return batches, items

    @at("transfer of a batch")
    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs(inputs)

    @at("forward")
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass."""
        return super().compute_loss(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Does one forward and backward pass, and hands its loss to the watch."""
        if self.fast and self.fast.fp8:
            self.fast.fp8.start_pass(self.state.global_step * self.args.gradient_accumulation_steps + self._pass)
        self._pass += 1
        loss = super().training_step(*args, **kwargs)
        self.watch.add(loss, self._blocks.popleft() if self._blocks else None)
        return loss

    @at("clipping of the gradients")
    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        average_gradients(weight for weight in model.parameters() if weight.requires_grad)
        return super()._clip_grad_norm(model)

    @at("clipping of the gradients")
    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.watch.end_step(self.state.global_step + 1, norm)
        self._stop_in_trouble(wait=False)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._stop_in_trouble(wait=True)
        super().log(logs, *args, **kwargs)

    def _stop_in_trouble(self, *, wait: bool) -> None:
        """Raises what the watch reports. Of several processes, each looks at the values of all, and only where all do so together.

        Raises:
            RunError: the same in every process, with the rows; spoilt checkpoints are set aside.
        """
        several = self.accelerator.num_processes > 1
        if several and not wait:  # when a value arrives differs from process to process
            return
        trouble = self.watch.look_together(values_of_all) if several else self.watch.look(wait=wait)
        if trouble is None:
            return
        passes = (
            f" in forward pass {trouble.batch} of {trouble.batches}" if trouble.batch and trouble.batches > 1 else ""
        )
        passes += f" in process {trouble.process} of {self.accelerator.num_processes}" if trouble.process else ""
        rows = [self.train_dataset[number]["row_ids"] for number in trouble.blocks]
        where = f"; its data: {rows_in_words(trouble.blocks, rows)}" if rows else ""
        goes_on = from_first(lambda: after_failure(Path(self.args.output_dir), trouble.since, trouble.evidence))
        raise (CommonFailure if several else RunError)(
            f"{trouble.what} at step {trouble.step}{passes}{where}",
            next_step=f"{trouble.fix}; the run goes on from {goes_on}.",
        )

    def goes_on_from(self) -> str:
        """Sets aside the checkpoints since the watch suspects the weights; returns where the run goes on from.

        For failures that the watch does not find itself.
        """
        health = self.watch.health
        return after_failure(Path(self.args.output_dir), health.since or None, health.why)

    @at("evaluation")
    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Evaluates the mean loss per trained token, over all processes."""
        model = self.model
        sums = torch.zeros(2, dtype=torch.float64)
        rows = 0
        with in_eval_mode(model):
            for batch in dataloader:
                batch = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    if self.fast and self.fast.loss:
                        losses, tokens = chunked_row_losses(model, batch, self.fast.loss)
                    else:
                        losses, tokens = row_losses(model, batch)
                losses, tokens = self.accelerator.gather_for_metrics((losses, tokens))
                sums += torch.stack([losses.sum(), tokens.sum()]).double().cpu()
                rows += len(tokens)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
                cut_short = sigterm.received() or sigterm.interrupted()
                if cut_short and self.accelerator.num_processes == 1:  # the few seconds left are for saving
                    break
        done = rows >= len(dataloader.dataset) or not (sigterm.received() or sigterm.interrupted())
        metrics = {f"{metric_key_prefix}_loss": float(sums[0] / sums[1])} if done else {}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saves_to) if self._saves_to else super()._get_output_dir(trial)

    @at("saving of a checkpoint")
    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Writes a checkpoint in a folder of its own, seals it there, and only then moves it into place.

        Raises:
            RunError: it could not be written, or is not valid; older checkpoints are as they were.
        """
        self._stop_in_trouble(wait=True)
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero():
            saved.discard(folder / saved.UNFINISHED)
        self.accelerator.wait_for_everyone()
        self._saves_to = folder / saved.UNFINISHED
        written = self._saves_to / f"checkpoint-{self.state.global_step}"
        try:
            with saved.clear_write_errors(written):
                super()._save_checkpoint(model, trial)
                self._write_sum(written)
                if self.is_world_process_zero():
                    write_processes(written, self._taking_part())
                if several_machines():  # whose folders may be copies
                    files_to_first(written, self.args.process_index)
                if self.trained_on is not None and self.is_world_process_zero():
                    write_json(written / saved.TRAINED_ON, self.trained_on)
        finally:
            self._saves_to = None
        self.accelerator.wait_for_everyone()  # the seal covers the files of all processes
        if self.is_world_process_zero():
            try:
                saved.put_in_place(written)
            except saved.SpoiltWeights as error:
                raise RunError(
                    f"{written.name} holds weights that are not finite",
                    next_step=f"Lower train.learning_rate; the run goes on from {self.goes_on_from()}.",
                ) from error

    def _taking_part(self) -> Processes:
        count = self.accelerator.num_processes
        passes = self.args.gradient_accumulation_steps
        return Processes(count, self.args.per_device_train_batch_size * passes * count)

    def _sum_name(self) -> str:
        return f"loss_sum_{self.args.process_index}.json"

    def _write_sum(self, checkpoint: Path) -> None:
        kept = {
            "loss": float(self._tr_loss),
            "since_step": self._globalstep_last_logged,
            "recent": list(self.watch.recent),
            "overflows": self.watch.overflows,
            "health": asdict(self.watch.health.evidence()),
        }
        write_json(checkpoint / self._sum_name(), kept)

    def restore_loss_sum(self, checkpoint: Path) -> None:
        """Restores the loss summed between the last log and the save, so that the next log covers all its steps."""
        of_all = [read_record(path, _LossSum) for path in sorted(checkpoint.glob("loss_sum_*.json"))]
        if not of_all:
            return
        own = checkpoint / self._sum_name()
        kept = read_record(own, _LossSum) if own.is_file() else of_all[0]
        # What is logged is the mean over the processes; another number of them each goes on from the mean.
        same = len(of_all) == self.accelerator.num_processes
        self._tr_loss += kept.loss if same else sum(each.loss for each in of_all) / len(of_all)
        self._globalstep_last_logged = kept.since_step
        self.watch.recent.extend(kept.recent)
        self.watch.overflows = kept.overflows
        self.watch.health.restore(kept.health)
