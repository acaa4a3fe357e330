"""What a run will need, told before it begins: from config and headers alone, no weight is read."""
