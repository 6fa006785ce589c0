"""The experiment file.

tables      its tables, and what their keys may hold
schema      a study of them, and what of it cannot be
load        read, extended, overridden by ``--set``, every path absolute
explain     a problem as one line that names the key
"""

from pipeline.config.load import features_config, load_config
from pipeline.config.schema import JOINT, ConfigError, RunConfig, RunOptions
from pipeline.config.tables import CacheConfig, FeaturesConfig, SetConfig, folder_name

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
