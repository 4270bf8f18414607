"""Examples to copy; `examples.paper` is the laboratory."""
