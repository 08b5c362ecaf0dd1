"""What runs inside measured processes, a module for each kind."""
