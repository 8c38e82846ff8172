"""The command line: parsing only, one sub-command a verb."""


def main() -> None:
    """Entry point of `sparse-bitnet`."""
