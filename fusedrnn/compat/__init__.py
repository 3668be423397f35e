"""Functions with the interfaces of other packages."""
