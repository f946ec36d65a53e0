"""Putting a kernel into guest memory so that it starts: loaders, tables, command line."""
