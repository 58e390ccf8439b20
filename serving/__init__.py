"""The service: configuration, store, cache, gateway, wire protocols, the Ray Serve graph and the command line."""
