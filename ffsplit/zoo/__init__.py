"""Many models in one batch: each compressed, judged and published on its own."""
