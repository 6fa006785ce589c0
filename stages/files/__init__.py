"""Files that stage two and three leave: JSON documents with their digests, tensors, rows that are mapped."""
