"""Fast white-box attacks: PGD, targeted DLR, AutoAttack."""
