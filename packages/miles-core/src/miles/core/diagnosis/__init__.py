"""Why the engine's log-probabilities differ from the trainer's: ``miles diagnose``."""
