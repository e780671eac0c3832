"""Answers, metrics and the scorecard; comparing two models, and asking one in a cell."""
