"""Studies of the papers' guarantees, from their configuration to tables and figures."""
