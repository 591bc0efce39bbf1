"""The most of what a user may ask for: far beyond any use, and short of what would never end."""

MAX_INT = 2**31 - 1  # of a whole number, where nothing else is said
MAX_POSITIONS = 2**24  # of a sequence
MAX_BLOCKS = 1024
