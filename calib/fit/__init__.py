"""The fits: one layer on its own, blocks of them, and what is decided over many."""
