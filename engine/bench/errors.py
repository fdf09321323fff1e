"""What can end a benchmark."""


class BenchError(RuntimeError):
    """A benchmark that cannot go on. The message says whether server, model or machine failed, and how."""


class LostConnectionError(BenchError):
    """The server cannot be reached any more, or has broken off in the middle of an answer."""
