"""Many models in one batch. Each is compressed, measured and published separately."""
