"""What makes a training step faster without changing what is learned, one part a file; `parts` opens them together."""
