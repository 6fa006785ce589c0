"""The experiment file.

schema      its tables and keys, and what of a study cannot be
load        read, extended, overridden by ``--set``, every path absolute
explain     a problem as one line that names the key
"""

from pipeline.config.load import features_config, load_config
from pipeline.config.schema import (
    JOINT,
    CacheConfig,
    ConfigError,
    FeaturesConfig,
    RunConfig,
    RunOptions,
    SetConfig,
    folder_name,
)

__all__ = [
    "JOINT",
    "CacheConfig",
    "ConfigError",
    "FeaturesConfig",
    "RunConfig",
    "RunOptions",
    "SetConfig",
    "features_config",
    "folder_name",
    "load_config",
]
