"""`bench suite`: everything worth knowing about a machine, measured by one command.

Each part is a module with two functions:

  plan() -> list[str]                      keys of the part's rows on this device, the most
                                           valuable first
  measure(missing, earlier) -> Iterator    yields the rows of the missing keys as they are measured

A row is a dict with its `key`; a later row of the same key replaces it. `partial` marks a row that
a later run measures again, and `failed` holds the message of what could not be measured. `earlier`
maps the names of the parts to their rows so far.

The supervisor (`supervisor`) allots the time to the parts and keeps their rows; worker processes
(`worker`), which alone touch the device, run them. A kernel that hangs or crashes ends its worker,
not the results.
"""
