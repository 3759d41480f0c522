"""Which portable defense keeps most of my images under attack, and at what cost? The paper's section IV (extra ``eval``).

On the command line it is ``oag-transform evaluate``. Its parts serve on their own:

- :mod:`~oag_transform.evaluation.catalogue`: the lists of attacks and experiments
- :mod:`~oag_transform.evaluation.attacks`: FGSM, IGSM, MI-FGSM and C&W, from foolbox
- :mod:`~oag_transform.evaluation.adaptive`, :mod:`~oag_transform.evaluation.unrolled`,
  :mod:`~oag_transform.evaluation.adaptive_checks`: attacks through a defense, gradients through ours, and who judges them
- :mod:`~oag_transform.evaluation.certification`, :mod:`~oag_transform.evaluation.batch_norm`: certified accuracy
- :mod:`~oag_transform.evaluation.data`: photographs on disk
- :mod:`~oag_transform.evaluation.backbones`, :mod:`~oag_transform.evaluation.targets`,
  :mod:`~oag_transform.evaluation.fitting`: classifiers, as they come, as they are named, and fitted here
- :mod:`~oag_transform.evaluation.measure`, :mod:`~oag_transform.evaluation.store`: accuracies, kept on disk
- :mod:`~oag_transform.evaluation.experiments`, :mod:`~oag_transform.evaluation.results`: tables and figures, as data
- :mod:`~oag_transform.evaluation.recommend`: what to take, in words
- :mod:`~oag_transform.evaluation.render`: how results are shown, from their JSON alone

The defenses are in :mod:`oag_transform.baselines`.
"""
