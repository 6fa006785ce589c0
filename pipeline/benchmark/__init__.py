"""`make results`: the benchmark's studies, compared."""
