"""The same rows and shapes through other trainers: TRL's SFTTrainer, with and without Liger's kernels, and Unsloth.

`step_speed.py` calls this for the variants `trl`, `trl_liger` and `unsloth`. Rows are packed as each trainer packs them; RECOMPUTED
0 switches checkpointing off. Both take their loss on whole texts.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from step_speed import Case

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def targets(case: Case) -> list[str]:
    """What gets an adapter, as in our own cases: of a mixture its attention alone."""
    from records import shape_of

    shape = shape_of(case.model)
    return ATTENTION if shape.get("num_experts") or shape.get("num_local_experts") else TARGETS


class Counting:
    """A collator that counts the tokens that are not padding."""

    def __init__(self, collator: Any, pad_token_id: int) -> None:
        self.collator, self.pad, self.tokens = collator, pad_token_id, 0

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collator(rows)
        self.tokens += int((batch["input_ids"] != self.pad).sum())
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)


def measure_peer(case: Case, source: str, seq_len_tokens: int) -> dict[str, Any]:
    """Trains a few steps with another trainer and returns what was measured.

    Args:
        case: model, variant, micro-batch and whether activations are recomputed.
        source: of the rows.
        seq_len_tokens: of a packed block.
    """
    if case.variant == "unsloth":
        import unsloth  # noqa: F401  before transformers: it changes it
    from datasets import Dataset
    from step_speed import ON_GPU, TIMED, WARM, Clock, data_settings, memory_held, weights_held
    from trl import SFTConfig, SFTTrainer

    from qlora_helpers.data.sources import read_corpus

    checkpointing = case.checkpointed != 0
    build = _unsloth if case.variant == "unsloth" else _plain
    model, tokenizer, adapter = build(case, seq_len_tokens, checkpointing)
    rows = read_corpus(data_settings(source, seq_len_tokens)).train
    texts = [
        {"text": f"Summarize the chat dialogue:\n{row.prompt}\n---\nSummary:\n{row.answer}{tokenizer.eos_token}"}
        for row in rows
    ]
    weights = weights_held()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=case.blocks,
            max_steps=WARM + TIMED,
            logging_steps=1000,
            learning_rate=2e-4,
            bf16=ON_GPU,
            use_cpu=not ON_GPU,
            packing=True,
            max_length=seq_len_tokens,
            report_to="none",
            save_strategy="no",
            gradient_checkpointing=checkpointing,
            use_liger_kernel=case.variant == "trl_liger",
            optim="adamw_torch_fused",
            dataset_num_proc=1,
            disable_tqdm=True,
            gradient_accumulation_steps=1,  # Unsloth's own default is 2
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )
        trainer = SFTTrainer(
            model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(texts), args=arguments, **adapter
        )
        counting = Counting(trainer.data_collator, tokenizer.pad_token_id)
        trainer.data_collator = counting
        clock = Clock(lambda: counting.tokens)
        trainer.add_callback(clock)
        trainer.train()
    return clock.result() | memory_held(weights) | {"mean_block_tokens": round(counting.tokens / (WARM + TIMED), 1)}


def _plain(case: Case, seq_len_tokens: int, checkpointing: bool) -> tuple[Any, Any, dict[str, Any]]:
    """The model as our own cases have it; TRL adds the adapters."""
    from peft import LoraConfig

    from qlora_helpers.base.config import ModelConfig
    from qlora_helpers.model import loading

    loaded = loading.load_model(ModelConfig(name=f"random:{case.model}"), say=lambda text: None)
    adapter = LoraConfig(
        r=case.rank, lora_alpha=32, target_modules=targets(case), lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    return loaded.model, loaded.tokenizer, {"peft_config": adapter}


def _unsloth(case: Case, seq_len_tokens: int, checkpointing: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Unsloth quantises a 16-bit checkpoint of the same shape itself."""
    import torch
    from unsloth import FastLanguageModel

    folder = _checkpoint(case)
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=seq_len_tokens, load_in_4bit=True, dtype=torch.bfloat16, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=case.rank,
        target_modules=targets(case),
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        random_state=0,
        use_gradient_checkpointing="unsloth" if checkpointing else False,
    )
    return model, tokenizer, {}


def _checkpoint(case: Case) -> Path:
    """A 16-bit checkpoint with random weights; made once."""
    import subprocess

    folder = Path(tempfile.gettempdir()) / f"random-{case.model}"
    if not (folder / "config.json").exists():  # in a process of its own, whose memory is given back
        subprocess.run([sys.executable, __file__, case.model, str(folder)], check=True)
    return folder


def make(name: str, folder: str) -> None:
    """Writes the checkpoint."""
    from step_speed import catalogue

    from qlora_helpers.base.config import ModelConfig
    from qlora_helpers.model import loading

    catalogue(name)
    loaded = loading.load_model(ModelConfig(name=f"random:{name}", quantization="none"), say=lambda text: None)
    vars(loaded.model.config).pop("random_weights", None)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make(*sys.argv[1:])
