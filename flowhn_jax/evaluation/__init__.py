"""The quality of trained models, and the texts they generate."""
