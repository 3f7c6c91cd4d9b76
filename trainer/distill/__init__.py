"""Distillation: small students that learn from trained teachers, within a time budget."""
