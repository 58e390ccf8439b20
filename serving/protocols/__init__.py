"""Wire protocols: one module each, from a request's JSON to `GenerateRequest`s and from `Chunk`s back to JSON."""
