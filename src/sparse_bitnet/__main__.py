"""`python -m sparse_bitnet`: the command line, as torchrun wants it."""

from sparse_bitnet.cli import main

if __name__ == "__main__":
    main()
