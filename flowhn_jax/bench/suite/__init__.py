"""`bench suite`: everything worth knowing about a machine, measured by one command.

Each part is a module with two functions:

  plan() -> list[str]                      keys of the rows that the part has on this device,
                                           the most valuable first
  measure(missing, earlier) -> Iterator    rows of the missing keys as they are measured

A row is a dict with its `key`. One that is yielded again replaces the earlier one; `partial` marks
a row that a later run measures again, `failed` holds the message of what could not be measured.
`earlier` maps the names of the parts to their rows so far.

The supervisor (`supervisor`) gives the parts their time and keeps their rows; a worker process
(`worker`), which alone touches the device, runs them. A kernel that hangs or crashes takes the
worker down, not the results.
"""
