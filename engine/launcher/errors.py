"""What can keep a server from starting beside its model and its settings."""


class LaunchError(RuntimeError):
    """The machine does not give what a server needs: an address, a folder. The message says which and why."""
