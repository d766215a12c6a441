"""Labelled text: where it comes from, how it becomes tokens, and how it is dealt to the clients."""
