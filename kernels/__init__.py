"""Operations that decide the speed of the models, each behind one public function.

Every folder holds one operation: its `__init__` checks the arguments and picks a backend, the other
files are backends. Nothing here knows of Flax or of the rest of the project.
"""
