"""The benchmark: metadiskfs beside its peers, its behaviour at scale, and its node alone. See docs/PERFORMANCE.md."""
