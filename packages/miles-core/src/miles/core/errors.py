"""Errors that Miles raises on purpose.  All are picklable, so they cross process borders whole."""


class MilesError(Exception):
    """Root of every error that Miles raises on purpose."""


class ConfigError(MilesError):
    """The configuration cannot work.  Raised before any device is taken.

    ``problems`` holds one sentence per mistake: the flag, its value, what was expected, what to do.  All mistakes
    are reported together.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in self.problems)


class PluginError(MilesError):
    """A plugin is missing, registered twice, or cannot be imported."""


class DataError(MilesError):
    """A row of a data file is malformed.  Names the file, the line and the reason."""


class EngineError(MilesError):
    """An engine or the router answered with an error, died, or did not answer in time."""


class RolloutError(MilesError):
    """A rollout cannot be completed: too many groups fail or are dropped.  Says how many and why."""


class RewardError(MilesError):
    """Grading fails again and again, or failed once where the run is to end then.  Says what failed and how."""


class WeightSyncError(MilesError):
    """What an engine holds is not what the trainer sent.  Names the tensors."""


class CheckpointError(MilesError):
    """A checkpoint is missing, torn or corrupted.  Names the file and the last good checkpoint."""


class TrainingError(MilesError):
    """A model, batch or gradient that cannot be trained on.  Names the samples where samples are to blame."""
