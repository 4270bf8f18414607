"""Is a robustness figure real, or gradient masking? About thirty attacks, and twelve checks of them."""
