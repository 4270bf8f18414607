"""Speed of the package and what the surgery does to public networks."""
