"""The server's configuration: one frozen struct, and the command line that is generated from it."""

from engine.config.run import ModelFacts, ModelSource, RunConfig, read_run_config, write_run_config
from engine.config.server import ConfigError, ServerConfig

__all__ = [
    "ConfigError",
    "ModelFacts",
    "ModelSource",
    "RunConfig",
    "ServerConfig",
    "read_run_config",
    "write_run_config",
]
