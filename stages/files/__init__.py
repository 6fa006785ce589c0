"""What stages leave on the disk: text, JSON and documents; named arrays; arrays of rows."""
