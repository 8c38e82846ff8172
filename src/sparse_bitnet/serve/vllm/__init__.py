"""Plugin for vLLM: ``vllm serve DIRECTORY`` runs a packed directory, with no option said.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins`` and the rest
through ``quant_method`` of the directory's ``config.json``.
"""


def register() -> None:
    """Make packed directories known; vLLM calls this in each of its processes, more than once."""
    import sparse_bitnet.serve.vllm.config  # noqa: F401  registers the quantization method
