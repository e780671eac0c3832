"""Commands of the command line that are more than a call: lists and comparisons of runs, sweeps, a teacher's board"""
