"""Fuzzing: damaged inputs of every kind, each given to the real command line in a watched child.

It has to end with success or with one clear message and a status that is not 0: without a
traceback, within seconds, and without a write outside its folder, a connection, or a pickle loaded.
"""
