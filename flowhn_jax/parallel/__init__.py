"""Meshes of devices, shardings of arrays, and the processes of a run."""
