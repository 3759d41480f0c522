"""What else would do: the defenses of other papers, and controls, that ours is compared with."""
