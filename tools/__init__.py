"""Long-running tests of whole commands: soak (chaos), resource growth, fuzzing. Not installed."""
