"""What a user types; the only place where the parts are put together."""
