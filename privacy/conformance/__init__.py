"""The self-test of a mechanism: what it releases, against what is claimed."""
