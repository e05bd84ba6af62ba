"""Start-up and shutdown of an engine: its parts, phase by phase, and the report of what fits."""
