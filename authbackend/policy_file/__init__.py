"""The policy file: what the registry should contain, as one YAML document."""
