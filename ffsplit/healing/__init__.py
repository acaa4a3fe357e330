"""End-to-end distillation of a compressed model from its original."""
