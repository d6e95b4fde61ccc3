"""Generators: everything that can answer a prompt. One file a backend, one socket for all."""
