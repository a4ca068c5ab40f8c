"""Results for people: the terminal (`show`) and still figures (`figures`)."""
