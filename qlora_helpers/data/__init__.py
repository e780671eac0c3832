"""A source becomes examples, then text, tokens, labels, packed sequences and batches; the embedded corpus."""
