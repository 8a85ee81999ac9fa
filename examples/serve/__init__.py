"""A server of one pipeline under tiers of schedules: start from it for your own. Run `python -m serve --help`."""
