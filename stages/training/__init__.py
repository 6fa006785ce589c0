"""What trains: loops, objectives, recipes, checkpoints, processes."""
