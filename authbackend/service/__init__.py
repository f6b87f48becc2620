"""The processes of a replica: how they are built, started, watched and stopped."""
