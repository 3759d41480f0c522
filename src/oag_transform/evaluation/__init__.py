"""Which portable defense protects my classifier on my images, and at what cost? The paper's section IV (extra ``eval``).

On the command line it is ``oag-transform evaluate``. Its parts serve on their own:

- :mod:`~oag_transform.evaluation.attacks`: FGSM, IGSM, MI-FGSM and C&W, from foolbox
- :mod:`~oag_transform.evaluation.peers`, :mod:`~oag_transform.evaluation.pixeldefend`,
  :mod:`~oag_transform.evaluation.online`: other defenses, each an ``nn.Module`` on [0, 1] batches
- :mod:`~oag_transform.evaluation.defenses`: all of them with their strengths
- :mod:`~oag_transform.evaluation.data`, :mod:`~oag_transform.evaluation.targets`: photographs and classifiers
- :mod:`~oag_transform.evaluation.measure`, :mod:`~oag_transform.evaluation.store`: accuracies, kept on disk
- :mod:`~oag_transform.evaluation.experiments`, :mod:`~oag_transform.evaluation.results`: tables and figures
- :mod:`~oag_transform.evaluation.figures`, :mod:`~oag_transform.evaluation.report`: how they are shown
"""
