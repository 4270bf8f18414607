"""Is a robustness figure real, or gradient masking? About thirty attacks, and eleven checks of them."""
