"""A run: planned once, then owned by one object."""
