"""Which portable defense keeps most of my images under attack, and at what cost? The paper's section IV (extra ``eval``).

On the command line it is ``oag-transform evaluate``. A plan has rows and columns; their cells are computed through a
store and make a result, which has one JSON form and is rendered from that.

- :mod:`~oag_transform.evaluation.options`: the lists of attacks and experiments, and their settings
- :mod:`~oag_transform.evaluation.data`, :mod:`~oag_transform.evaluation.targets`,
  :mod:`~oag_transform.evaluation.backbones`, :mod:`~oag_transform.evaluation.fitting`: images on disk, and classifiers
- :mod:`~oag_transform.evaluation.subject`, :mod:`~oag_transform.evaluation.columns`,
  :mod:`~oag_transform.evaluation.plan`: a target and its images, rows and columns, and all of them together
- :mod:`~oag_transform.evaluation.attacks`: gray-box and adaptive attacks, exact gradients, and diagnostics
- :mod:`~oag_transform.evaluation.store`, :mod:`~oag_transform.evaluation.provenance`: what is computed once, under what key
- :mod:`~oag_transform.evaluation.experiments`: tables, figures, adaptive attacks, convergence, certificates
- :mod:`~oag_transform.evaluation.result`, :mod:`~oag_transform.evaluation.statistics`: what was found, and what it says
- :mod:`~oag_transform.evaluation.render`: how results are shown, from their JSON alone

The defenses are in :mod:`oag_transform.baselines`.
"""
