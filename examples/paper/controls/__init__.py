"""Small experiments with controls: `python -m examples.paper controls`."""
