"""Stage one's parts: what changed, a shard's reader, encoder and writer, and how a cache is filled."""
