"""What can be wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A model that cannot be found, read or served. The message names the path and what is wrong with it."""
