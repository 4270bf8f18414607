"""Attacks, written for speed: PGD, robust error with early stopping, AutoAttack."""
