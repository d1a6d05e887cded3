"""Privacy: what is promised (plan), how it is kept (clipping, noise, mechanism), what it costs."""
