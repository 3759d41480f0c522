"""The tables and figures of the paper's section IV, and some that it lacks: each a short function of a plan.

:data:`oag_transform.evaluation.options.EXPERIMENTS` is the list of them. Nothing is drawn or written here.
"""
