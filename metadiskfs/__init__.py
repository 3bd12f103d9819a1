"""metadiskfs: the MetaDisk network as a directory."""

__version__ = "0.1.0"
