"""One run, from its configuration to the published artifact."""
