"""Settings of the model and of its adapters."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_helpers.base.config.option import option


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
        "Names or paths of the layers that get an adapter; none takes all linear layers of the text part. A mixture's experts get "
        "adapters where experts is among the names.",
    )
    use_rslora: bool = option(
        False, "Scale by lora_alpha / sqrt(r) instead, for high ranks (Kalajdzievski 2023, arXiv:2312.03732)."
    )
    use_dora: bool = option(
        False,
        "Train magnitude and direction separately, which is slower and sometimes better (Liu et al. 2024, arXiv:2402.09353).",
    )
