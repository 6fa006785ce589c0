"""ID rows of a study: what trains, selects and calibrates; rows that are read as they are needed."""
