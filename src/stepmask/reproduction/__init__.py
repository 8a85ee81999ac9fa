"""Published protocols as recipes, run from the pipeline to the table of results."""
