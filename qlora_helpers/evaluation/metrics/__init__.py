"""Metrics by task: text, labels, JSON fields, short answers, numbers, a function of the user's; the choice among them."""
