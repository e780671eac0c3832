"""Many greedy answers in a short time, a part a file; `answer` puts them together."""
