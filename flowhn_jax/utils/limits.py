"""Upper limits of what a user may ask for: far above any use, low enough to end in finite time."""

MAX_INT = 2**31 - 1  # of a whole number that has no limit of its own
MAX_POSITIONS = 2**24  # of a sequence
MAX_BLOCKS = 1024
