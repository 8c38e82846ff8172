"""The packed directory: its files written, checked, loaded and inspected."""
