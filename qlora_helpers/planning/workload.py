"""A training run as the planner sees it: the model, its settings, the GPUs, and how much there is to train on.

Built once and passed on. Owns what the settings allow on this hardware; knows nothing of bytes, seconds or choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.machine.hardware import Gpu, Hardware
from qlora_helpers.model.shapes.decoder import ModelSizes
from qlora_helpers.model.shapes.families import has_dropout
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.planning.fp8 import with_matmul_dtype
from qlora_helpers.planning.layout import ONE, SPREAD, Layout, layouts
from qlora_helpers.planning.speed import UNNAMED_GPU
from qlora_helpers.planning.step_settings import (
    SUMMARY_SHARE,
    StepSettings,
    is_packed,
    may_capture,
    sequences_per_step,
    step_settings,
)


@dataclass(frozen=True)
class TrainingTokens:
    """How much there is to train on.

    Attributes:
        an_epoch: tokens of all training rows.
        trained_share: share of them that count in the loss.
    """

    an_epoch: int
    trained_share: float

    def in_all(self, config: RunConfig) -> int:
        """Returns the tokens of the whole training; `train.max_steps` counts however much data there is."""
        if config.train.max_steps is not None:
            return config.train.max_steps * sequences_per_step(config.train) * config.data.seq_len_tokens
        return round(self.an_epoch * config.train.epochs)


@dataclass(frozen=True)
class Workload:
    """What is trained, with which settings, on which GPUs.

    Attributes:
        config: settings of the run.
        shape: the model's `config.json`.
        hardware: the GPUs, with their price.
        tokens: of the whole training, in all epochs.
        trained_share: share of the tokens that count in the loss.
        one_process: rules out every way to use several GPUs that takes several processes.
        only: the one way to use them that is open, where processes run already; None leaves the choice.
    """

    config: RunConfig
    shape: dict[str, Any]
    hardware: Hardware
    tokens: int
    trained_share: float = SUMMARY_SHARE
    one_process: bool = False
    only: Layout | None = None

    @cached_property
    def sizes(self) -> ModelSizes:
        """The model's sizes.

        Raises:
            ModelError: the shape lacks a size.
        """
        return model_sizes(self.shape)

    @cached_property
    def _step(self) -> StepSettings:
        return step_settings(
            self.config,
            self.shape,
            micro_batch_size=self.config.train.micro_batch_size,
            trained_share=self.trained_share,
        )

    def step(self, **changes: Any) -> StepSettings:
        """Returns the settings of one step, compiled unless `changes` says otherwise.

        Raises:
            ModelError: the shape lacks a size, or a target layer is unknown.
        """
        step = replace(self._step, **changes)
        return step if "fp8" in changes else with_matmul_dtype(step, self.config.train, self.sizes, self.gpu)

    @cached_property
    def packed(self) -> bool:
        """Whether rows are packed: asked for, and possible with this model."""
        return is_packed(self.config, self.shape)

    @property
    def gpu(self) -> Gpu:
        """The GPU whose speed counts: one like it where only an amount of memory is known."""
        return self.hardware.gpu or UNNAMED_GPU

    @property
    def sequences_per_step(self) -> int:
        """Sequences that an optimizer step learns from."""
        return sequences_per_step(self.config.train)

    @property
    def not_shared(self) -> str:
        """Why the layers can't be shared out as shards, as loading and adapters refuse it; empty where they can."""
        if self.sizes.expert_stacks:
            return "a mixture's experts can't be shared out yet"
        if self.config.adapter.use_dora:
            return "DoRA reads whole weights, which no process has then"
        return "" if self.config.model.quantization == "nf4" else "there are no 4-bit weights to share out"

    @property
    def possible_layouts(self) -> tuple[Layout, ...]:
        """The ways that these GPUs and this model allow, whatever the settings ask for."""
        hardware = self.hardware
        found = layouts(hardware.gpus, hardware.machines, self.sequences_per_step)
        return tuple(each for each in found if each.shards == 1 or not self.not_shared)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The ways in which the GPUs may be used: those that `train.share` allows and that share a step's sequences evenly.

        In one process the layers are spread over all GPUs.
        """
        if self.only is not None:
            return (self.only,)
        found = self.possible_layouts
        if self.one_process:
            return tuple(each for each in found if each.share in (ONE, SPREAD))[-1:]
        asked = [each for each in found if each.share == self.config.train.share]
        return tuple(asked) or found

    @property
    def may_compile(self) -> bool:
        """Whether layers may be compiled: not without the fast step, nor where rows are padded and differ in length."""
        return self.config.train.fast_step and self.packed

    @property
    def may_capture(self) -> bool:
        """Whether one process can capture its passes as CUDA graphs on one of these GPUs."""
        bfloat16 = self.gpu.supports_bf16 and self.config.model.compute_dtype != "float16"
        dropout = self.config.adapter.lora_dropout > 0 or has_dropout(self.shape)
        return bfloat16 and may_capture(self.config.train, self.packed, dropout)

    @property
    def embedding_places(self) -> tuple[bool, ...]:
        """Whether the input embedding may be offloaded: not where it is the output layer too, nor without the fast step."""
        return (False,) if self.sizes.tied or not self.config.train.fast_step else (False, True)

    def on(self, hardware: Hardware) -> Workload:
        """The same training on other GPUs, in any way that is open there."""
        return replace(self, hardware=hardware, only=None)

    def with_settings(self, changes: Sequence[str]) -> Workload:
        """The same training with some settings changed, as `--set` takes them."""
        return replace(self, config=self.config.with_settings(changes))
