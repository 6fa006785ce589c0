"""What users bring: images and arrays."""
