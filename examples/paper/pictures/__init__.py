"""The pictures of the documentation: `python -m examples.paper pictures`."""
