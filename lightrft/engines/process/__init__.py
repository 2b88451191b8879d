"""Any engine in a process of its own: both sides of it."""
