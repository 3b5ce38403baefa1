"""Files that others wrote: folders, single files, and JSON, opened and read without trust in them."""
