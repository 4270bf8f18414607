"""Is the gradient masked? Every attack we know, and what they say together."""
