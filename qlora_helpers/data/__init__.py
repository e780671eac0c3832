"""Turns a source into examples, then into text, tokens, labels, packed sequences and batches; holds the embedded corpus."""
