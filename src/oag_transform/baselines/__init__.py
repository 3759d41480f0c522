"""Defenses of other papers, and controls, that OAG is compared with."""
