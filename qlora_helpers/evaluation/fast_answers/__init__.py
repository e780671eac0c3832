"""Many greedy answers in a short time; each part has a file, and `answer` puts them together."""
