"""What a scored study says: its table, its files and their formats."""
