"""The folders that runs are kept in."""
