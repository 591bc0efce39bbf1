"""The most of what a user may ask for: far beyond any use, and short of what would never end."""

MOST = 2**31 - 1  # of a whole number, where nothing else is said
MOST_POSITIONS = 2**24  # of a sequence
MOST_BLOCKS = 1024
