"""Adapted-MoE: one expert per sub-class, a router that chooses it, features adapted to its moments."""
