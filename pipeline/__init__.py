"""Running the stages: experiment files, command line, engine, records, report."""
