"""The rooms that touch the world: stage worker processes, the pipeline that joins them, the service."""
