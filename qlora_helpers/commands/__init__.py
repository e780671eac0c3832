"""The commands of the command line: a module has the arguments of a few commands that belong together, and what they call.

Each has a function `add(commands)`, which `__main__` calls. What a command needs beyond its arguments is imported when it runs, so
that `--help` answers at once.
"""
