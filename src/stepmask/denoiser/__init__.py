"""One network: how its blocks are found, watched, and run under a schedule."""
