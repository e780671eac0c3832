"""What each notebook takes on a laptop and on six kinds of GPU: seconds, GiB and dollars, measured where they were, else computed.

Training is the plan's (`qlora_helpers/planning`). What is not training is computed from the constants below, each of which is
stated on the page (`templates/bands.md`) or comes from a record beside this file. `notebook_band_tables.py` has the tables.
"""

from __future__ import annotations

import ast
import json
import math
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import median
from typing import Any

from records import own_steps, record

from qlora_helpers.base.config import RunConfig
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.base.units import gib
from qlora_helpers.machine.hardware import Gpu, Hardware, parse_gpus
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.model.shapes.decoder import ModelSizes
from qlora_helpers.model.shapes.lookup import find_shape
from qlora_helpers.model.shapes.sizes import model_sizes
from qlora_helpers.planning.candidates import Candidate, candidate
from qlora_helpers.planning.cpu_speed import cpu_seconds
from qlora_helpers.planning.forecast import make_forecast, steps_and_tokens
from qlora_helpers.planning.plan import make_plan
from qlora_helpers.planning.run_plan import data_size, trained_share
from qlora_helpers.planning.speed import COMPILE_S, FITTED, WEIGHT_BYTES, step_seconds
from qlora_helpers.planning.step_settings import is_packed
from qlora_helpers.planning.workload import Workload

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
DISK_BYTES_S = 125e6  # what an EBS volume of the kind gp3 reads without extra charge
HALF = 2  # bytes of a weight in a checkpoint, and of a copy that answers
PASSES_TIMED = 3  # of each step that notebook 09 looks at: one is counted, two are timed
EVALUATION_SHARE = 1 / 3  # of a training step's time that a forward pass alone takes
CONTEXT_GIB = 0.75  # CUDA's own, as the plan has it


@dataclass(frozen=True)
class Work:
    """What a notebook does with the model of its profile. All else in it is the same in every profile: `tiny` measures it.

    Attributes:
        loads: how often the checkpoint is read.
        adapters: whether there are adapters.
        trains: whether the whole run is trained.
        steps: steps that are looked at alone, not compiled, of one sequence.
        answering: models that answer all held-out rows: untuned, its chat template, examples in the prompt, tuned.
        asked: single prompts that are answered besides.
        merges: whether a merged model is written.
        prepares: whether the run's data are read, labelled and packed.
        always: the profile whose model it loads whatever the reader's is; empty where it is the reader's.
    """

    loads: int = 0
    adapters: bool = False
    trains: bool = False
    steps: int = 0
    answering: int = 0
    asked: int = 0
    merges: bool = False
    prepares: bool = False
    always: str = ""

    @property
    def uses_gpu(self) -> bool:
        """Whether the notebook loads a model onto a GPU where there is one."""
        return self.loads > 0


WORK = {
    "primer": Work(),
    "00_setup": Work(),
    "01_load_model": Work(loads=1, asked=1),
    "02_lora_config": Work(loads=1, adapters=True),
    "03_prepare_data": Work(prepares=True),
    "04_train": Work(loads=1, adapters=True, trains=True, prepares=True),
    "05_monitor": Work(),
    "06_evaluate": Work(loads=2, adapters=True, answering=4, asked=3, merges=True),
    "07_scale_out": Work(),
    "08_clean_up": Work(loads=1, adapters=True, trains=True, always="tiny"),
    "09_fast_step": Work(loads=1, adapters=True, steps=9),
    "10_your_own_task": Work(loads=1, adapters=True, trains=True, answering=4, prepares=True),
    "11_leaving": Work(loads=1, adapters=True, asked=20, merges=True),
}
"""By notebook; `tests/test_bands.py` compares with what the cells call."""


@dataclass(frozen=True)
class OnGpu:
    """A notebook on a machine with GPUs, in one profile.

    Attributes:
        name: of the notebook.
        config: of its run.
        hardware: the GPUs that it uses, with the price of the whole machine.
        planned: whether the plan's settings are taken, and not the profile's as they are.
    """

    name: str
    config: RunConfig
    hardware: Hardware
    planned: bool

    @property
    def work(self) -> Work:
        return WORK[self.name]

    @cached_property
    def workload(self) -> Workload:
        """The training in the notebook's own process, which has loaded the model: over several GPUs its layers are spread."""
        shape = find_shape(self.config.model)
        size = data_size(self.config.data)
        assert size is not None, "the profiles' own data are known"
        _, tokens = steps_and_tokens(self.config, size, packed=is_packed(self.config, shape))
        return Workload(self.config, shape, self.hardware, tokens, trained_share(self.config.data), one_process=True)

    @cached_property
    def training(self) -> Candidate:
        """The whole training."""
        size = data_size(self.config.data)
        assert size is not None
        steps, _ = steps_and_tokens(self.config, size, packed=self.workload.packed)
        if self.planned:
            choice = make_plan(self.workload, fix=False).choice
            assert choice is not None, f"{self.config.profile} fits on {self.hardware.label}"
            return choice
        return make_forecast(self.workload, steps).step

    def seconds(self) -> float:
        """From the first cell to the last."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by what takes them."""
        work, sizes = self.work, self.workload.sizes
        own = measured(self.name, "demo" if self.config.profile == "demo" and not work.uses_gpu else "tiny")
        parts = {"all else": (own or measured(self.name, "tiny"))["cpu_s"]}
        if work.always:
            return parts | {"first step": first_step_s()}
        if work.prepares and self.config.profile == "falcon-40b":  # the demo's are in "all else"
            parts["data"] = self.workload.tokens * preparing_s()
        if not work.uses_gpu:
            return parts
        parts["loading"] = work.loads * (HALF * sizes.parameters / DISK_BYTES_S + sizes.parameters * quantising_s())
        if work.trains:
            parts["training"] = self.training.seconds + self.evaluating_s()
            parts["first step"] = 0.0 if self.training.compiled else first_step_s()
        if work.steps:
            step = self.workload.step(micro_batch_size=1, compiled=False, trained_share=1.0)
            parts["steps"] = work.steps * PASSES_TIMED * step_seconds(sizes, step, self.workload.gpu)
            parts["first step"] = first_step_s()
        if work.answering or work.asked:
            parts["answers"] = self.answering_s()
        if self.merged:
            parts["merged model"] = HALF * sizes.parameters / DISK_BYTES_S
        return parts

    @property
    def merged(self) -> bool:
        """Whether a merged model is written; notebooks 06 and 11 skip Falcon-40B's, which takes 78 GiB."""
        return self.work.merges and self.config.profile != "falcon-40b"

    def seconds_on_a_core(self) -> float:
        """The same without a GPU, by the plan's rate of one core: for a notebook that was not measured in its profile."""
        work, sizes, share = self.work, self.workload.sizes, self.workload.trained_share
        seconds = measured(self.name, "tiny")["cpu_s"] + work.loads * HALF * sizes.parameters / DISK_BYTES_S
        if work.trains:
            seconds += cpu_seconds(sizes, self.workload.tokens, share, cores=1)
        steps = work.steps * PASSES_TIMED * self.config.data.seq_len_tokens
        seconds += cpu_seconds(sizes, steps, 1.0, cores=1)
        rows, config = self.config.data.most_rows("test") or 0, self.config.evaluation
        answers = rows * work.answering + work.asked
        size = data_size(self.config.data)
        assert size is not None
        prompts = answers + (rows * config.few_shot if work.answering > 2 else 0)
        tokens = prompts * size.tokens_per_row + answers * config.max_new_tokens
        return seconds + cpu_seconds(sizes, tokens / 2, 1.0, cores=1)  # a forward pass is half of the four operations

    def evaluating_s(self) -> float:
        """The evaluation loss, as often as it is computed while training."""
        rows = self.config.data.most_rows("eval") or 0
        size, train = data_size(self.config.data), self.config.train
        assert size is not None
        steps, _ = steps_and_tokens(self.config, size, packed=self.workload.packed)
        times = math.ceil(steps / train.eval_steps) if train.eval_steps else math.ceil(train.epochs)
        return EVALUATION_SHARE * times * rows * size.tokens_per_row / self.training.tokens_per_s

    def answering_s(self) -> float:
        """Every held-out row by each model, and the single prompts."""
        config, gpu, size = self.config.evaluation, self.workload.gpu, data_size(self.config.data)
        assert size is not None
        rows = self.config.data.most_rows("test") or 0
        with_examples = self.work.answering > 2 and config.few_shot  # longer prompts for one of the models
        prompts = rows * (self.work.answering + (config.few_shot if with_examples else 0)) + self.work.asked
        batches = self.work.answering * math.ceil(rows / config.batch_size) + self.work.asked
        tokens = batches * config.max_new_tokens
        return slower_than_computed() * answers_s(
            self.workload.sizes, gpu, prompts * size.tokens_per_row, tokens, copied=self.copies_fit
        )

    def gib(self) -> float:
        """The most that a GPU holds at any time; 0 where it stays empty."""
        if not self.work.uses_gpu:
            return 0.0
        work, held = self.work, [self.loaded_gib()]
        if work.trains:
            held.append(self.training.peak_gib)
        if work.steps:
            step = self.workload.step(micro_batch_size=1, compiled=False, trained_share=1.0)
            found = candidate(self.workload, step, gpus=self.hardware.gpus, gradient_accumulation_steps=1)
            held.append(found.peak_gib)
        if work.answering:
            held.append(self.loaded_gib() + self.answering_gib() + (self.copies_gib() if self.copies_fit else 0.0))
        return max(held)

    def loaded_gib(self) -> float:
        """The model's weights on the fullest GPU, its adapters and CUDA's own."""
        parts = self.spread.memory
        held = max(gib(each.weights + (each.adapters if self.work.adapters else 0)) for each in parts)
        return held + CONTEXT_GIB

    @cached_property
    def spread(self) -> Candidate:
        """The smallest step over these GPUs, whose weights count."""
        step = self.workload.step(micro_batch_size=1, compiled=False, checkpointed=self.workload.sizes.layers)
        return candidate(self.workload, step, gpus=self.hardware.gpus, gradient_accumulation_steps=1)

    def copies_gib(self) -> float:
        """Unpacked copies of the 4-bit weights, on each GPU."""
        sizes = self.workload.sizes
        return gib(HALF * sizes.layers * sizes.quantized_parameters_per_layer) / self.hardware.gpus

    @property
    def copies_fit(self) -> bool:
        """Whether answers may use unpacked copies; else they unpack each weight for each token."""
        needed = self.loaded_gib() + self.answering_gib() + self.copies_gib()
        return needed < 0.9 * self.hardware.usable_gib

    def answering_gib(self) -> float:
        """Keys, values and logits of a batch of answers, on each GPU."""
        config, sizes, size = self.config.evaluation, self.workload.sizes, data_size(self.config.data)
        assert size is not None
        rows = min(config.batch_size, self.config.data.most_rows("test") or config.batch_size)
        a_token = 2 * HALF * sizes.layers * sizes.kv_heads * sizes.head_dim / self.hardware.gpus
        length = (1 + config.few_shot) * size.tokens_per_row + config.max_new_tokens
        return gib(rows * (length * a_token + sizes.vocab * (HALF + 4)))


def answers_s(sizes: ModelSizes, gpu: Gpu, prompt_tokens: float, passes: float, *, copied: bool) -> float:
    """Computes the seconds of greedy answers: prompts at the matrix rate, then one pass over all weights for each new token.

    Args:
        sizes: of the model.
        gpu: one card; layers that are spread over several work one after another.
        prompt_tokens: of all prompts.
        passes: over the model that make one token of each answer in a batch.
        copied: whether weights were unpacked once, and are not for each pass.
    """
    linear = sizes.layers * sizes.quantized_parameters_per_layer
    prompts = 2 * prompt_tokens * linear / (gpu.bf16_tflops * 1e12 * FITTED.matrix_share)
    read = (HALF if copied else WEIGHT_BYTES) * linear + HALF * sizes.vocab * sizes.hidden
    one = read / (gpu.bandwidth_gb_s * 1e9 * FITTED.memory_share) + sizes.layers * FITTED.gaps_s
    return prompts + passes * one


@cache
def slower_than_computed() -> float:
    """How many times as long as computed the slowest of the measured cases took, on an H100."""
    found = record("evaluation_speed_one_gpu")
    gpu, new_tokens = parse_gpus("H100").gpu, found["options"]["new_tokens"]
    assert gpu is not None
    ratios = []
    for case in found["cases"]:
        sizes = model_sizes(SHAPES[case["model"].lower().removesuffix("-instruct")])
        ours = case["variants"]["ours"]
        computed = answers_s(
            sizes,
            gpu,
            ours["rows"] * ours["mean_prompt_tokens"],
            math.ceil(ours["rows"] / case["batch"]) * new_tokens,
            copied="copies" in case["form"][0],
        )
        ratios.append(min(ours["seconds"]) / computed)
    return max(1.0, *ratios)


@cache
def quantising_s() -> float:
    """Seconds for a weight that is drawn and quantised, as Falcon-7B's random weights were on an H100."""
    (found,) = record("true_size_one_gpu")["models"].values()
    return float(found["load_s"] / found["parameters"])


@cache
def preparing_s() -> float:
    """Seconds for a token that is read, labelled and packed on one core: of the longest file that was measured."""
    found = max(record("data_speed_two_cores")["points"], key=lambda point: point["tokens"])
    return float(found["cpu_s"] / found["tokens"])


@cache
def first_step_s() -> float:
    """What the first step of uncompiled layers takes on an H100 before it computes: the median of our measured steps."""
    found = [case["first_step_s"] for case in own_steps() if not case["compiled"] and case.get("first_step_s")]
    return median(found) if found else COMPILE_S


@cache
def measured(name: str, profile: str) -> dict[str, float]:
    """What a notebook took on one core; empty where it was not measured in this profile."""
    return record("notebook_cost_two_cores")["profiles"].get(profile, {}).get(name, {})


def config_of(name: str, profile: str) -> RunConfig:
    """The settings of a notebook's run: the profile's, with the notebook's own where its cells have a dict `SETTINGS`."""
    config, names = profile_config(profile), {"PROFILE": profile}
    for cell in json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "SETTINGS = {" not in source:
            continue
        for statement in ast.parse(source).body:
            if isinstance(statement, ast.Assign):
                (target,), value = statement.targets, statement.value
            elif isinstance(statement, ast.AugAssign):
                target, value = statement.target, statement.value
            else:
                continue
            if isinstance(value, ast.IfExp):
                holds = eval(compile(ast.Expression(value.test), "a notebook's cell", "eval"), {"PROFILE": profile})
                value = value.body if holds else value.orelse
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
                names[target.id] = value.value
            elif isinstance(target, ast.Name) and target.id == "SETTINGS" and isinstance(value, ast.Dict):
                config = config.with_settings(_plain(value, names))
    return config


def _plain(found: ast.Dict, names: dict[str, Any]) -> dict[str, Any]:
    """A dict of constants, and of names that were given constants before."""
    return {
        ast.literal_eval(key): names[value.id] if isinstance(value, ast.Name) else ast.literal_eval(value)
        for key, value in zip(found.keys, found.values, strict=True)
        if key is not None
    }
