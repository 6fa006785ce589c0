"""How features are computed: what of it is part of what they are. Importing it loads nothing."""

# The meaning of a cached row. Raise it when the same image and weights would give other features.
EXTRACTION_SEMANTICS = 2

# Every forward pass of an extraction has exactly this many images, by kind of device, the last one padded: with one
# shape, one memory format, one precision and one thread a pass the kernels, and so the bits, do not depend on the sizes
# of shards, on cores or on workers. A GPU's is chosen by its memory since (`stages.networks.batch`); the number that it
# had stays here because the links of all studies hold both.
COMPUTE_BATCH = {"cpu": 16, "cuda": 128}
COMPUTE_THREADS = 1
