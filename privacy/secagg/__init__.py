"""Secure aggregation: the sum of the sites' vectors, and nothing else of them (README.md here)."""
