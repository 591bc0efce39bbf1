"""Fuzzing of the commands: damaged inputs of every kind, each in a watched child process.

Each command must succeed, or fail with one clear message and a non-zero status: without a
traceback, within seconds, and without writing outside its folder, opening a connection or loading a
pickle.
"""
