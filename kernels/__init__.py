"""The operations that decide the speed of the models, one public function each.

Every folder holds one operation: its `__init__` checks the arguments and picks a backend, the other
files are backends. Nothing here depends on Flax or on the rest of the project.
"""
