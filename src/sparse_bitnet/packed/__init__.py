"""The packed directory: write, verify, load, inspect."""
