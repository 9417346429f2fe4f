"""Models as services: requests in, pieces of text out, on this machine or over the cluster."""
