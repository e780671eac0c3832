"""Answers, metrics, scorecard, the comparison of two models, and asking a model in a cell."""
