"""Stage one's work on one shard."""
