"""The format that transformers itself calls ``bitnet``, written and read."""
