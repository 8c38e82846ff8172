"""Packed models: written, loaded; and their way from and to the formats of others.

    packed/     the packed directory: written, checked, loaded, inspected
    gguf/       → one file for llama.cpp
    bitnet/     ⇄ the format that transformers itself calls ``bitnet``

The three below the first stand on ``packed`` and know nothing of each other. exportable.py is what
gguf and bitnet read; verbs.py and export.py are where the command line enters.
"""
