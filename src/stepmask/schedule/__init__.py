"""The table: what is computed and what is reused, its graph, its file, its rectification. No torch here."""
