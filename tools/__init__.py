"""Tests from outside, for as long as one lets them: harm to a run, growth, fuzzing."""
