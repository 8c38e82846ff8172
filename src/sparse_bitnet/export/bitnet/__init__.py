"""transformers' ``bitnet`` format: export and import."""
