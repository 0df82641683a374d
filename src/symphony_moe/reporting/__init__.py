"""Numbers to pages."""
