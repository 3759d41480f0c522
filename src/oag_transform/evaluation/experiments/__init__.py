"""The tables and figures of the paper's section IV, and two that it lacks: each a function of a plan that returns a result.

:data:`oag_transform.evaluation.catalogue.EXPERIMENTS` is the list of them. Nothing is drawn or written here.
"""
