"""Baselines of OAG: the defenses of other papers, and controls."""
