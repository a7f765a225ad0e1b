"""Reference models: the architectures of METHODS, each a few dozen lines."""
