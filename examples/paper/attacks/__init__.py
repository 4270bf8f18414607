"""Attacks, written for speed."""
