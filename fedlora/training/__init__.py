"""One client's work, and the slots it happens in."""
