"""Turns a model's name into an audited 4-bit model with adapters: checkpoints, loading, placement, NF4, LoRA, random weights."""
