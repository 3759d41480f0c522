"""The HTTP service of ``oag-transform serve``: uploads, batches, computations and routes."""
