"""The processes of a replica: build, start, watch and stop them."""
