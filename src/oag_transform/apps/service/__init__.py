"""The HTTP service behind ``oag-transform serve``: uploads, batches, what is computed for them, and the routes."""
