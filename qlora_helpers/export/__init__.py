"""Writes what leaves a run: adapter files, certificate, merged model, drift, model card, publishing."""
