"""Many steps: from a recorded run to a schedule."""
