"""The laboratory: it reproduces the paper's tables and attacks our own networks."""
