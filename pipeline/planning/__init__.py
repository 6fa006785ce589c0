"""`plan`: what a study would cost, before anything runs."""
