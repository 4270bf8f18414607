"""The queue of runs, their filed results, tables and pictures."""
