"""The trainer, its callback and checkpoints, the loss watch, and the proofs on the loaded model."""
