"""The pipeline's stages: each reads files, runs one piece of the package, and writes files whole."""
