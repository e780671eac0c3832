"""Writes what leaves a run: adapter, merged model, GGUF, Modelfile, chat template, certificate, drift, card, publishing."""
