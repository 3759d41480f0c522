"""Who calls: the commands of ``oag-transform``, each with ``HELP``, ``EXTRA``, ``add_arguments`` and ``run``."""
