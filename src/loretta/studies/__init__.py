"""The paper's experiments as declarative files, the runner that carries them out, and their collected results."""
