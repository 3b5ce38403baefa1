"""Number formats and the dtype policy."""
