"""What the kernel sees: FUSE callbacks, and the file system behind them without FUSE."""
