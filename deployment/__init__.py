"""Partner sites instead of simulated ones: kits, roster, certificates, supervision, control plane.

Nothing here knows a model or a record; server and sites both rest on it.
"""
