"""The policy file: the desired contents of the registry as a YAML document."""
