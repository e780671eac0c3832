"""One run, one folder: opening it, its status, progress, requests, locks, budget, launching and clean-up."""
