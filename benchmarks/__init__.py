"""Speed, numbers and memory, measured: see README.md."""
