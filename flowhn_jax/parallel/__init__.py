"""Meshes of devices and how arrays lie on them."""
