"""What every process of Tokenmill shares, and the launcher that starts them (see docs/architecture.md)."""

__version__ = "0.1.0"
