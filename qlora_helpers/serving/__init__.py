"""Serves a run's model to OpenAI clients on this machine: a process that checks a token and answers for two or more names"""
