"""Comparisons with the programs a user would otherwise type; see run.py."""
