"""What makes a training step faster without changing what is learned, a part a file; `parts` opens them together."""
