"""``make study``: one experiment with several backbones, held to published numbers; ``README.md`` beside says how."""
